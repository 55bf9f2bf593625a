"""Runs whose nodes come and go: `python -m tests.faults.elastic STORY RUN_DIR OVERRIDE ...`.

In a process of its own, for the nodes are a Ray of their own. The run itself is a driver like any other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import psutil

from raytune_ds.rundir import parse_lines
from tests.faults.nodes import Nodes, nodes
from tests.head import BIN

STEPS = 25
"""That each number of workers makes: enough for a checkpoint of what they did."""
NOTICE_S = 30


class Driver:
    """Of a run that is under way."""

    def __init__(self, run: Path, address: str, overrides: list[str]) -> None:
        """Starts it."""
        self.run = run
        command = [
            sys.executable,
            "-m",
            "raytune_ds.train",
            f"run.storage={run.parent}",
            f"run.name={run.name}",
        ]
        self._process = psutil.Popen([*command, *overrides], env={**os.environ, "RAY_ADDRESS": address})

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """While it runs."""
        while not condition():
            assert self._process.poll() is None, "the run has ended"
            threading.Event().wait(0.1)

    def wait(self) -> int:
        """Its exit code."""
        return int(self._process.wait())

    def steps_on(self, size: int) -> int:
        """Made so far on so many workers; 0 unless the newest was."""
        metrics = self.run / "metrics.jsonl"
        rows = [row for row in parse_lines(metrics.read_bytes()) if "loss" in row] if metrics.exists() else []
        return len(list(takewhile(lambda row: row["world_size"] == size, reversed(rows))))

    def checkpoints(self) -> set[str]:
        """The complete ones."""
        return {file.parent.name for file in (self.run / "checkpoints").glob("step-*/manifest.json")}


def resize(cluster: Nodes, driver: Driver) -> None:
    """A node goes without a word, and later another one comes."""
    driver.wait_until(lambda: driver.steps_on(3) >= STEPS)
    cluster.kill_node(cluster.named("RayTrainWorker")[0][0])
    driver.wait_until(lambda: driver.steps_on(2) >= STEPS)
    cluster.add()
    driver.wait_until(lambda: driver.steps_on(3) >= STEPS)


def preempt(cluster: Nodes, driver: Driver) -> None:
    """A node gives notice, and goes when it said it would: Ray takes an earlier death for a failure."""
    driver.wait_until(lambda: driver.steps_on(2) >= STEPS)
    before = driver.checkpoints()
    node = cluster.named("RayTrainWorker")[0][0]
    command = [BIN / "ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = time.monotonic() + NOTICE_S
    subprocess.run([*command, "--deadline-remaining-seconds", str(NOTICE_S)], check=True)
    driver.wait_until(lambda: bool(driver.checkpoints() - before))
    assert time.monotonic() < deadline, "the checkpoint came too late"
    driver.wait_until(lambda: time.monotonic() > deadline + NOTICE_S / 2)
    cluster.kill_node(node)


STORIES = {"resize": resize, "preempt": preempt}


def main(story: str, run: str, *overrides: str) -> int:
    """The driver's exit code."""
    with nodes(3) as cluster:
        driver = Driver(Path(run), cluster.address, list(overrides))
        STORIES[story](cluster, driver)
        return driver.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
