"""What the nodes of a cluster have to have in common, looked at before a run asks anything of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raytune_ds import network
from raytune_ds.console import warn
from raytune_ds.doctor import agree, places
from raytune_ds.doctor.versions import PACKAGES, versions
from raytune_ds.errors import UserError
from raytune_ds.nodes import NOT_INSTALLED, Delegates, Silent, alive

DEADLINE_S = 60.0


@dataclass(frozen=True)
class View:
    """What a node sees.

    Attributes:
        versions: of what has to agree.
        interface: what is wrong with the network interfaces that are set there.
        storage: why it can't work with the storage.
    """

    versions: Mapping[str, str]
    interface: str | None = None
    storage: str | None = None


def preflight(root: str) -> None:
    """Asks all nodes at once, where there are several.

    Args:
        root: `run.storage`, absolute.

    Raises:
        UserError: versions differ, a node does not see the storage, or its network interface is set wrong; all of it.
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
    named = {node.name: answer for node, answer in answers.items()}
    lines = list(problems(root, named))
    if lines:
        lines.append("`raytune-ds doctor --cluster` shows each node's state.")
        raise UserError("\n".join(lines))
    for name, answer in named.items():
        if isinstance(answer, Silent):  # it may just be dying, which is no reason not to train on the others
            warn(f"node {name} does not answer: {answer.reason}")


def _look(root: str, mark: str) -> View:
    """On a node."""
    return View(versions(), network.problem(os.environ), places.trouble(root, mark))


def problems(root: str, answers: Mapping[str, View | Silent]) -> Iterator[str]:
    """What the user has to mend, in lines.

    Args:
        root: `run.storage`, absolute.
        answers: by the name of the node.
    """
    views = {node: answer for node, answer in answers.items() if isinstance(answer, View)}
    without = [node for node, answer in answers.items() if answer == Silent(NOT_INSTALLED)]
    if without:
        yield f"raytune_ds is not installed on {', '.join(without)}. Install the same version on all nodes."
    if differences := list(_differences({node: view.versions for node, view in views.items()})):
        yield "the nodes of the cluster have different versions:"
        yield from differences
        yield "Install the same on all of them, or use one image."
    if interfaces := [f"  on {node}: {view.interface}" for node, view in views.items() if view.interface]:
        yield "the network interface of gloo or NCCL is set wrong:"
        yield from interfaces
        yield "Unset it where Ray is started, and it is found by itself."
    if unseen := [f"  {node} {view.storage}" for node, view in views.items() if view.storage]:
        yield f"run.storage = {root}: is not shared by all nodes of the cluster:"
        yield from unseen
        yield "Set run.storage to a file system that all nodes mount, or to a bucket (s3://, gs://)."


def _differences(of_nodes: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for package in PACKAGES:
        values = {node: found[package] for node, found in of_nodes.items()}
        odd = agree.differing(values)
        for node, value in odd.items():
            usual = next(other for other_node, other in values.items() if other_node not in odd)
            yield f"  {package}: {value} on {node}, {usual} on other nodes"
