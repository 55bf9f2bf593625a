"""Plain functions, run on every node of the Ray cluster at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ds.errors import first_line

NOT_INSTALLED = "raytune_ds is not installed there"


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's.
        name: what people call it: its host name, or its address, or what it takes to tell it from the others.
        address: the IP address by which the other nodes reach it.
    """

    id: str
    name: str
    address: str


@dataclass(frozen=True)
class Silent:
    """Stands for the answer of a node that gave none; `reason` says why."""

    reason: str


def alive() -> list[Node]:
    """All nodes that Ray takes for alive, the driver's own first."""
    own = ray.get_runtime_context().get_node_id()
    found = [node for node in ray.nodes() if node["Alive"]]
    found.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"], node["NodeID"]))
    hosts = [node["NodeManagerHostname"] for node in found]
    addresses = [node["NodeManagerAddress"] for node in found]
    ids = [node["NodeID"][:6] for node in found]
    names = next(choice for choice in (hosts, addresses, ids) if max(Counter(choice).values()) == 1)
    return [
        Node(node["NodeID"], name, node["NodeManagerAddress"])
        for node, name in zip(found, names, strict=True)
    ]


@ray.remote(num_cpus=0)
class _Delegate:
    """Runs functions on its node. A process of its own: what it sets or loads is gone with it."""

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        return function(*arguments)


class Delegates:
    """A process on each of some nodes, from `with` to its end."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Starts them; `run` waits until they are there."""
        self._delegates = {
            node: _Delegate.options(  # type: ignore[attr-defined]  # Ray adds it
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote()
            for node in nodes
        }

    def __enter__(self) -> Delegates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for delegate in self._delegates.values():
            ray.kill(delegate)

    def run(
        self, function: Callable[..., Any], *arguments: Any, deadline_s: float | None = None
    ) -> dict[Node, Any | Silent]:
        """The answer of every node to the same question; Silent for those without one after `deadline_s`, if any."""
        return self.run_each(function, dict.fromkeys(self._delegates, arguments), deadline_s)

    def run_each(
        self, function: Callable[..., Any], arguments: Mapping[Node, Sequence[Any]], deadline_s: float | None
    ) -> dict[Node, Any | Silent]:
        """As `run`, but each node has arguments of its own."""
        asked = {node: self._delegates[node].run.remote(function, given) for node, given in arguments.items()}
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=deadline_s)
        late = Silent(f"no answer after {deadline_s or 0:.0f} s")
        return {node: _answer(ref) if ref in done else late for node, ref in asked.items()}


def _answer(ref: Any) -> Any | Silent:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        text = str(error)
        if "No module named 'raytune_ds" in text:
            return Silent(NOT_INSTALLED)
        if isinstance(error, ray.exceptions.RayTaskError) and str(error.cause).strip():
            return Silent(first_line(error.cause))
        return Silent(next((line for line in reversed(text.splitlines()) if line.strip()), "it died").strip())
