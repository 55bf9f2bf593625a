"""The moment and the deed: waits until a run is where its scenario wants it, and kills."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from raytune_ds.rundir import parse_lines
from tests.faults.chaos.scenarios import Scenario
from tests.faults.nodes import Nodes

T = TypeVar("T")
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
        Missed: the run ended before, or the moment was over.
    """
    end = time.monotonic() + DEADLINE_S

    def until(condition: Callable[[], T]) -> T:
        while not (found := condition()):
            if (code := driver.poll()) == 0:
                raise Missed("the run ended before")
            assert code is None, f"the driver ended with {code} before anything was killed"
            assert time.monotonic() < end, f"{scenario}: not within {DEADLINE_S:.0f}s"
            threading.Event().wait(0.001)
        return found

    if scenario.kind == "mid-checkpoint":
        folder = run / "checkpoints" / f"step-{5 * scenario.after:08d}"
        until(lambda: folder.exists() and not (folder / "manifest.json").exists())
        struck = _kill(scenario, cluster, driver), time.monotonic()
        if (folder / "manifest.json").exists():
            raise Missed("the checkpoint was finished")
    elif scenario.kind == "mid-fetch":
        if scenario.after > 1:
            _replace_a_worker(cluster, run, until)
        fetch = until(lambda: cluster.named(FETCH))[0][1]
        struck = _kill(scenario, cluster, driver, fetch), time.monotonic()
        if scenario.victim != "fetch" and fetch.is_running() and FETCH not in " ".join(fetch.cmdline()):
            raise Missed("the fetch was over")
    else:
        until(lambda: len(lines_of(run / "metrics.jsonl")) >= scenario.after)
        struck = _kill(scenario, cluster, driver), time.monotonic()
    threading.Event().wait(SETTLE_S)
    return survey(run, *struck)


def survey(run: Path, what: str, at: float) -> Struck:
    """Where a run stands after something was killed."""
    there = lines_of(run / "metrics.jsonl")
    step = parse_lines(there[-1] + b"\n")[0]["step"] if there else 0
    return Struck(what, at, step, frozenset(there))


def _replace_a_worker(cluster: Nodes, run: Path, until: Callable[[Callable[[], bool]], bool]) -> None:
    """A death of which the run recovers, so that the next one befalls workers that begin in its midst."""
    until(lambda: len(lines_of(run / "metrics.jsonl")) >= FIRST_DEATH)
    victims = cluster.named(WORKER)
    if not victims:
        raise Missed("no worker was there")
    old = {process.pid for _, process in victims}
    victims[0][1].kill()
    until(lambda: not old & {process.pid for _, process in cluster.named(WORKER)})


def _kill(
    scenario: Scenario, cluster: Nodes, driver: psutil.Popen, fetch: psutil.Process | None = None
) -> str:
    """What was killed, in words."""
    if scenario.victim == "driver":
        driver.kill()
    elif scenario.victim == "head":
        cluster.kill_head()
    elif scenario.victim == "fetch":
        assert fetch is not None
        fetch.kill()
    else:
        workers = sorted(cluster.named(WORKER), key=lambda found: found[1].create_time())
        if not workers:
            raise Missed("no worker was there")
        node, process = workers[scenario.rank % len(workers)]
        if scenario.victim == "node":
            cluster.kill_node(node)
        else:
            process.kill()
    return scenario.victim
