"""A Ray cluster of several nodes on this machine, each of which can be taken away."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator

import psutil

# Deaths are noticed in seconds, and a cluster without its head ends soon.
os.environ |= {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="rt"),  # short: socket paths below it have 107 characters at most
}

from ray.cluster_utils import Cluster

logging.getLogger("ray").setLevel(logging.WARNING)


class Nodes:
    """A head without a CPU for workers, and nodes with one CPU each."""

    def __init__(self, number: int) -> None:
        """Starts them."""
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 200 << 20}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(number):
            self.add()
        self.cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        """For drivers."""
        return str(self.cluster.address)

    def add(self) -> None:
        """One more node."""
        self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20)

    def processes(self, node: object) -> list[psutil.Process]:
        """That a node's raylet has started."""
        raylet = node.all_processes["raylet"][0].process  # type: ignore[attr-defined]
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(raylet.pid).children(recursive=True)
        return []

    def named(self, part: str) -> list[tuple[object, psutil.Process]]:
        """The processes on nodes other than the head with `part` in their title, each with its node."""
        found = []
        for node in self.cluster.worker_nodes:
            for process in self.processes(node):
                with contextlib.suppress(psutil.Error):
                    if part in " ".join(process.cmdline()):
                        found.append((node, process))
        return found

    def kill_node(self, node: object) -> None:
        """All of its processes, at once and without a word to anybody."""
        victims = self.processes(node)
        self.cluster.remove_node(node, allow_graceful=False)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_head(self) -> None:
        """The same with the head, after which there is no cluster."""
        victims = self.processes(self.cluster.head_node)
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def nodes(number: int) -> Iterator[Nodes]:
    """So many nodes beside the head, gone at the end whatever happens."""
    cluster = Nodes(number)
    try:
        yield cluster
    finally:
        left = [p for node in cluster.cluster.list_all_nodes() for p in cluster.processes(node)]
        cluster.cluster.shutdown()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
