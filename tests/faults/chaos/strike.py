"""The moment and the deed: waits until a run is where its scenario wants it, and kills."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from raytune_ds.rundir import parse_lines
from tests.faults.chaos.scenarios import Scenario
from tests.faults.nodes import Nodes

FETCH, WORKER = "fetch_rows", "RayTrainWorker"
DEADLINE_S = 180.0
FIRST_DEATH = 12
"""Steps, where a run is to die twice."""
SETTLE_S = 1.0
"""After which nothing more comes from those who do not know yet."""


class Missed(Exception):
    """The moment did not come while the run went on."""


@dataclass(frozen=True)
class Struck:
    """What was done.

    Attributes:
        what: in words.
        at: when, by time.monotonic.
        step: the last one that the run had done.
        lines: of its metrics.jsonl then.
    """

    what: str
    at: float
    step: int
    lines: frozenset[bytes]


def lines_of(metrics: Path) -> list[bytes]:
    """Of metrics.jsonl, those of steps; none while it is not there."""
    content = metrics.read_bytes() if metrics.exists() else b""
    return [line for line in content.split(b"\n")[:-1] if b'"loss"' in line]


def strike(scenario: Scenario, cluster: Nodes, driver: psutil.Popen, run: Path) -> Struck:
    """Kills what the scenario says, when it says.

    Raises:
        Missed: the run ended before.
    """
    wait = {"mid-checkpoint": _in_a_checkpoint, "mid-fetch": _in_a_fetch}.get(scenario.kind, _after_a_step)
    end = time.monotonic() + DEADLINE_S

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            if driver.poll() is not None:
                raise Missed(f"the driver ended with {driver.returncode} before")
            if time.monotonic() > end:
                raise Missed(f"{scenario}: not within {DEADLINE_S:.0f}s")
            threading.Event().wait(0.001)

    after = scenario.after
    while True:
        wait(after, cluster, run, until)
        at, what = time.monotonic(), _kill(scenario, cluster, driver)
        if scenario.kind != "mid-checkpoint" or _unfinished(run):
            break
        if scenario.victim != "worker":
            what += " (as it was finished)"
            break
        after += 1  # it was finished in the meantime, which is a death like any other; once more
    threading.Event().wait(SETTLE_S)
    return survey(run, what, at)


def survey(run: Path, what: str, at: float) -> Struck:
    """Where a run stands after something was killed."""
    there = lines_of(run / "metrics.jsonl")
    step = parse_lines(there[-1] + b"\n")[0]["step"] if there else 0
    return Struck(what, at, step, frozenset(there))


def _after_a_step(step: int, cluster: Nodes, run: Path, until: Callable[[Callable[[], bool]], None]) -> None:
    until(lambda: len(lines_of(run / "metrics.jsonl")) >= step)


def _in_a_checkpoint(
    number: int, cluster: Nodes, run: Path, until: Callable[[Callable[[], bool]], None]
) -> None:
    """Its folder is there and its manifest is not."""
    folder = run / "checkpoints" / f"step-{5 * number:08d}"
    until(lambda: folder.exists() and not (folder / "manifest.json").exists())


def _in_a_fetch(number: int, cluster: Nodes, run: Path, until: Callable[[Callable[[], bool]], None]) -> None:
    """A task reads batches: at the start of the run, or, the second time, at that of workers who replace a dead one."""
    if number > 1:
        _after_a_step(FIRST_DEATH, cluster, run, until)
        old = {process.pid for _, process in cluster.named(WORKER)}
        cluster.named(WORKER)[0][1].kill()
        until(lambda: not old & {process.pid for _, process in cluster.named(WORKER)})
    until(lambda: bool(cluster.named(FETCH)))


def _unfinished(run: Path) -> bool:
    folders = (run / "checkpoints").glob("step-*")
    return any(not (folder / "manifest.json").exists() for folder in folders)


def _kill(scenario: Scenario, cluster: Nodes, driver: psutil.Popen) -> str:
    if scenario.victim == "driver":
        driver.kill()
        return "driver"
    if scenario.victim == "head":
        cluster.kill_head()
        return "head"
    if scenario.victim == "fetch" and (fetching := cluster.named(FETCH)):
        fetching[0][1].kill()
        return "fetch task"
    workers = sorted(cluster.named(WORKER), key=lambda found: found[1].create_time())
    node, process = workers[scenario.rank % len(workers)]
    if scenario.victim == "node":
        cluster.kill_node(node)
        return "node"
    process.kill()
    return "worker"
