"""A run on three nodes that loses one and gets another: `python -m tests.faults.elastic STORAGE OVERRIDE ...`.

In a process of its own, for the nodes are a Ray of its own. The run is `elastic`; a JSON line tells how it ended.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
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
from raytune_ds.launch import launch

LOST_AFTER, BACK_AFTER = 8, 20
"""Optimizer steps."""


def steps(metrics: Path) -> int:
    """Done so far."""
    return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0


def main(storage: str, *overrides: str) -> None:
    """Runs it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
    metrics = Path(storage) / "elastic" / "metrics.jsonl"

    def weather() -> None:
        while steps(metrics) < LOST_AFTER:
            threading.Event().wait(0.05)
        cluster.remove_node(nodes[1], allow_graceful=False)
        while steps(metrics) < BACK_AFTER:
            threading.Event().wait(0.05)
        cluster.add_node(num_cpus=1)

    threading.Thread(target=weather, daemon=True).start()
    result = launch(compose([], [f"run.storage={storage}", "run.name=elastic", *overrides]))
    print(json.dumps({"status": result.status, "restarts": len(result.restarts)}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
