"""`raytune-ds doctor`: examines, shows, and says by its exit code whether anything is red."""

from __future__ import annotations

import platform
import sys

from raytune_ds import storage
from raytune_ds.config import Config
from raytune_ds.console import err
from raytune_ds.doctor.finding import Finding
from raytune_ds.doctor.report import as_json, exit_code, show, show_matrix
from raytune_ds.errors import UserError


def doctor(config: Config, *, on_cluster: bool, json: bool, debug: bool) -> int:
    """Examines this node, or all nodes of the Ray cluster.

    Args:
        config: whose run.storage is looked at.
        on_cluster: all nodes.
        json: print JSON in place of a table.
        debug: show what Ray says.

    Returns:
        The exit code: 2 where anything is red.

    Raises:
        UserError: there is no cluster.
    """
    root = storage.absolute(config.run.storage)
    findings = _of_cluster(root, debug) if on_cluster else _of_this_node(root)
    if json:
        sys.stdout.write(as_json(findings) + "\n")
    else:
        show(findings)
        show_matrix()
    return exit_code(findings)


def _of_this_node(root: str) -> dict[str, list[Finding]]:
    from raytune_ds.doctor.checks import examine

    return {platform.node(): examine(None, root)}


def _of_cluster(root: str, debug: bool) -> dict[str, list[Finding]]:
    from raytune_ds import cluster, nodes
    from raytune_ds.doctor.cluster import examine_all

    where = cluster.connect(debug)
    if where == "an embedded Ray":
        raise UserError("--cluster: no Ray runs here; set RAY_ADDRESS, or run it by `ray job submit`.")
    found = nodes.alive()
    err.print(f"{len(found)} node{'s' * (len(found) != 1)} of {where}", markup=False)
    return examine_all(found, root)
