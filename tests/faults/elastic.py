"""A run on three nodes that loses one and gets another: `python -m tests.faults.elastic STORAGE OVERRIDE ...`.

In a process of its own, for the nodes are a Ray of its own. The run is `elastic`; a JSON line tells how it ended.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from itertools import takewhile
from pathlib import Path

# Deaths are noticed soon, and growth is looked for often.
os.environ |= {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="rt"),
}

import ray
from ray.cluster_utils import Cluster

from raytune_ds.compose import compose
from raytune_ds.launch import Result, launch
from raytune_ds.rundir import parse_lines

STEPS = 25
"""That each number of workers makes: enough for a checkpoint of what they did."""


def steps_on(size: int, metrics: Path) -> int:
    """Made so far on so many workers; 0 unless the newest was."""
    rows = [row for row in parse_lines(metrics.read_bytes()) if "loss" in row] if metrics.exists() else []
    if not rows or rows[-1]["world_size"] != size:
        return 0
    return len(list(takewhile(lambda row: row["world_size"] == size, reversed(rows))))


def wait_for(size: int, metrics: Path, run: threading.Thread) -> None:
    """Until steps are made on so many workers."""
    while steps_on(size, metrics) < STEPS:
        assert run.is_alive(), f"the run ended before it had {size} workers"
        threading.Event().wait(0.2)


def main(storage: str, *overrides: str) -> None:
    """Runs it in a thread, for Ray adds nodes in the main one only."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
    metrics = Path(storage) / "elastic" / "metrics.jsonl"
    results: list[Result] = []

    def train() -> None:
        results.append(launch(compose([], [f"run.storage={storage}", "run.name=elastic", *overrides])))

    run = threading.Thread(target=train)
    run.start()
    wait_for(3, metrics, run)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(2, metrics, run)
    cluster.add_node(num_cpus=1)
    wait_for(3, metrics, run)
    run.join()
    print(json.dumps({"status": results[0].status, "restarts": len(results[0].restarts)}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
