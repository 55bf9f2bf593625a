"""The checks of every node of the Ray cluster, and those that take several nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from raytune_ds.doctor import agree, collective, places
from raytune_ds.doctor.checks import examine
from raytune_ds.doctor.finding import Finding
from raytune_ds.nodes import Delegates, Node, Silent

EXAMINE_S = 90.0
COLLECTIVE_S = 90.0  # torch is imported first
MARK_S = 30.0
CLOCK_S = 10.0
CLOCK_ROUNDS = 3
MOST_SKEW_S = 2.0
SLOW_MB_S = 100.0


def examine_all(nodes: Sequence[Node], root: str) -> dict[str, list[Finding]]:
    """The findings of every node, by its name.

    Args:
        nodes: of the cluster.
        root: `run.storage`, absolute, as all of them should see it.
    """
    several = len(nodes) > 1
    with Delegates(nodes) as delegates:
        own = {node: (node.address if several else None, root) for node in nodes}
        answers = delegates.run_each(examine, own, EXAMINE_S)
    findings = {node: _told(answer) for node, answer in answers.items()}
    there = [node for node, answer in answers.items() if not isinstance(answer, Silent)]
    if several and there:
        with Delegates(there) as delegates:
            _add(findings, _shared_storage(delegates, there[0], root))
            _add(findings, _clocks(delegates, there))
            _add(findings, _reached(delegates, there, "gloo"))
        with_gpus = [node for node in there if _has_gpus(findings[node])]
        if len(with_gpus) > 1:
            with Delegates(with_gpus) as delegates:
                _add(findings, _reached(delegates, with_gpus, "nccl"))
    return agree.judged({node.name: of_node for node, of_node in findings.items()})


def _told(answer: list[Finding] | Silent) -> list[Finding]:
    if isinstance(answer, Silent):
        return [Finding("answers", "bad", answer.reason, "look at this node and its raylet's log")]
    return answer


def _has_gpus(findings: Sequence[Finding]) -> bool:
    return any(finding.name == "torch.cuda" and finding.status == "ok" for finding in findings)


def _add(findings: dict[Node, list[Finding]], more: dict[Node, Finding]) -> None:
    for node, finding in more.items():
        findings[node].append(finding)


def _shared_storage(delegates: Delegates, first: Node, root: str) -> dict[Node, Finding]:
    """Whether each sees what the first one writes, and can write itself."""
    name = "run.storage"
    advice = "mount the same file system on all nodes, or set run.storage to a bucket (s3://, gs://)"
    mark = delegates.run_each(places.leave_mark, {first: (root,)}, MARK_S)[first]
    if isinstance(mark, Silent):
        return {first: Finding(name, "bad", f"{root}: can't be written: {mark.reason}", advice)}
    troubles = delegates.run(places.trouble, root, mark, deadline_s=MARK_S)
    delegates.run_each(places.remove_mark, {first: (mark,)}, MARK_S)
    reasons = {node: t.reason if isinstance(t, Silent) else t for node, t in troubles.items()}
    return {
        node: Finding(name, "ok", f"{root}: shared and writable")
        if reason is None
        else Finding(name, "bad", f"{root}: {reason}", advice)
        for node, reason in reasons.items()
    }


def _clocks(delegates: Delegates, nodes: Sequence[Node]) -> dict[Node, Finding]:
    """How far each clock is from the first node's, known to half the time of the fastest of a few round trips."""
    skews: dict[Node, tuple[float, float]] = {}
    for _ in range(CLOCK_ROUNDS):
        for node in nodes:
            asked = time.time()
            there = delegates.run_each(time.time, {node: ()}, CLOCK_S)[node]
            if not isinstance(there, Silent):
                half = (time.time() - asked) / 2
                skews[node] = min(skews.get(node, (float("inf"), 0.0)), (half, there - asked - half))
    base = skews.get(nodes[0], (0.0, 0.0))[1]
    return {node: clock_finding(skew - base, doubt) for node, (doubt, skew) in skews.items()}


def clock_finding(skew: float, doubt: float) -> Finding:
    """Of a clock that is `skew` seconds ahead of the first node's, give or take `doubt`."""
    if abs(skew) - doubt > MOST_SKEW_S:
        return Finding("clock", "bad", f"{skew:+.1f} s off", "run chrony or another NTP client on all nodes")
    return Finding("clock", "ok", f"within {MOST_SKEW_S:.0f} s")


def _reached(delegates: Delegates, nodes: Sequence[Node], backend: str) -> dict[Node, Finding]:
    """Whether one process a node can reduce with the others."""
    first, names = nodes[0], tuple(node.name for node in nodes)
    delegates.run(collective.show_gpus, deadline_s=COLLECTIVE_S)  # imports torch, before any time-out runs
    port = delegates.run_each(collective.free_port, {first: ()}, CLOCK_S)[first]
    if isinstance(port, Silent):
        return {first: Finding(backend, "bad", port.reason, "look at this node and its raylet's log")}
    meeting = collective.Meeting(backend, first.address, port, names)
    arguments = {node: (rank, node.address, meeting) for rank, node in enumerate(nodes)}
    speeds = delegates.run_each(collective.all_reduce, arguments, COLLECTIVE_S)
    return {node: reach_finding(backend, speed) for node, speed in speeds.items()}


def reach_finding(backend: str, answer: float | Silent) -> Finding:
    """Of the bytes a second that a node reached, or why it did not."""
    if isinstance(answer, Silent):
        advice = (
            "open all TCP ports between the nodes; gloo and NCCL must use the interface that the nodes share "
            f"({backend.upper()}_SOCKET_IFNAME)"
        )
        return Finding(backend, "bad", answer.reason, advice)
    speed = f"{answer / 1e6:,.0f} MB/s" if answer < 1e9 else f"{answer / 1e9:,.1f} GB/s"
    if answer < SLOW_MB_S * 1e6:
        advice = (
            "see that this is the fast network; adapters need little of it, engines that share a model much"
        )
        return Finding(backend, "warn", f"all-reduce at {speed}", advice)
    return Finding(backend, "ok", f"all-reduce at {speed}")
