"""What the nodes of a cluster have to have in common, looked at before a run asks anything of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from raytune_ds import network
from raytune_ds.console import warn
from raytune_ds.doctor import agree, places
from raytune_ds.doctor.versions import PACKAGES, versions
from raytune_ds.errors import UserError
from raytune_ds.nodes import Delegates, Node, Silent, alive

DEADLINE_S = 60.0
_DOCTOR = "`raytune-ds doctor --cluster` shows the rest."


@dataclass(frozen=True)
class _View:
    """What a node sees."""

    versions: dict[str, str]
    interface: str | None
    storage: str | None


def preflight(root: str) -> None:
    """Asks all nodes at once, where there are several.

    Args:
        root: `run.storage`, absolute.

    Raises:
        UserError: versions differ, a node does not see the storage, or its network interface is set wrong.
    """
    nodes = alive()
    if len(nodes) == 1:
        return
    mark = places.leave_mark(root)
    try:
        with Delegates(nodes) as delegates:
            answers = delegates.run(_look, root, mark, deadline_s=DEADLINE_S)
    finally:
        places.remove_mark(mark)
    views: dict[str, _View] = {}
    for node, answer in answers.items():
        if isinstance(answer, Silent):
            _say_silent(node, answer)
        else:
            views[node.name] = answer
    _require_same_versions({name: view.versions for name, view in views.items()})
    _require_interfaces({name: view.interface for name, view in views.items() if view.interface})
    _require_storage(root, {name: view.storage for name, view in views.items() if view.storage})


def _look(root: str, mark: str) -> _View:
    """On a node."""
    return _View(versions(), network.problem(os.environ), places.trouble(root, mark))


def _say_silent(node: Node, answer: Silent) -> None:
    """A node that is just dying is no reason not to train on the others; one without the package is."""
    if answer.reason == "raytune_ds is not installed there":
        raise UserError(
            f"node {node.name}: raytune_ds is not installed there. Install the same version on all nodes."
        )
    warn(f"node {node.name} does not answer: {answer.reason}")


def _require_same_versions(of_nodes: Mapping[str, Mapping[str, str]]) -> None:
    lines = []
    for package in PACKAGES:
        values = {node: found[package] for node, found in of_nodes.items()}
        if odd := agree.differing(values):
            usual = next(value for node, value in values.items() if node not in odd)
            lines += [
                f"  {package}: {value} on {node}, {usual} on other nodes" for node, value in odd.items()
            ]
    if lines:
        raise UserError(
            "the nodes of the cluster have different versions:\n"
            + "\n".join(lines)
            + f"\nInstall the same on all of them, or use one image. {_DOCTOR}"
        )


def _require_interfaces(problems: Mapping[str, str]) -> None:
    if problems:
        lines = "\n".join(f"node {node}: {problem}." for node, problem in problems.items())
        raise UserError(f"{lines}\nUnset it there, and the interface is found by itself. {_DOCTOR}")


def _require_storage(root: str, troubles: Mapping[str, str]) -> None:
    if troubles:
        lines = "\n".join(f"  node {node} {trouble}" for node, trouble in troubles.items())
        raise UserError(
            f"run.storage = {root}: is not shared by all nodes of the cluster:\n{lines}\n"
            f"Set run.storage to a file system that all nodes mount, or to a bucket (s3://, gs://). {_DOCTOR}"
        )
