"""docker/compose.yaml brought up: a head and two workers, a run over both workers, one of which is killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.containers import ROOT, Images, Sandbox, sandbox, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
BIN = Path(sys.executable).parent
FILE = ROOT / "docker" / "compose.yaml"
SERVICES = ("head", "worker")
STEPS = 40
RUN = (
    *("data.seq_len=128", f"train.max_steps={STEPS}", "train.global_batch=4", "scaling.num_workers=2"),
    *("checkpoint.every_steps=5", "run.storage=/shared/raytune_ds", "adapter.dropout=0"),
)


class Cluster:
    """The compose file's containers."""

    def __init__(self, box: Sandbox, override: Path) -> None:
        self._box, self._override = box, override

    def compose(self, *arguments: str) -> str:
        """Runs podman-compose."""
        return self._box.run(BIN / "podman-compose", "--file", FILE, "--file", self._override, *arguments)

    def podman(self, *arguments: str, timeout: float = 300) -> str:
        """Runs podman."""
        return self._box.podman(*arguments, timeout=timeout)

    def on_head(self, *command: str, timeout: float = 300) -> str:
        """Runs something in the head's container."""
        return self.podman("exec", self.names("head")[0], *command, timeout=timeout)

    def names(self, service: str) -> list[str]:
        """Of the service's containers, also those that were killed."""
        chosen = f"--filter=label=com.docker.compose.service={service}"
        return sorted(self.podman("ps", "--all", chosen, "--format={{.Names}}").split())

    def nodes(self) -> int:
        """Nodes that Ray counts as alive."""
        try:
            return int(self.on_head("python", "-c", COUNT_NODES).split()[-1])
        except RuntimeError:  # the head is not up yet
            return 0

    def submit(self, name: str, *options: str) -> str:
        """Submits a run as a job from the head; what Ray said."""
        command = ("ray", "job", "submit", "--address=http://localhost:8265", *options, "--")
        return self.on_head(
            *command, "python", "-m", "raytune_ds.train", f"run.name={name}", *RUN, timeout=600
        )

    def read(self, path: str) -> str:
        """A file below the shared volume; nothing where there is none."""
        return self.on_head("bash", "-c", f"cat /shared/raytune_ds/{path} 2> /dev/null || true")

    def losses(self, name: str) -> dict[int, float]:
        """The loss of each step so far."""
        lines = [json.loads(line) for line in self.read(f"{name}/metrics.jsonl").splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def is_healthy(self, name: str) -> bool:
        """By the container's own health check."""
        try:
            self.podman("healthcheck", "run", name)
        except RuntimeError:
            return False
        return True


COUNT_NODES = (
    "from ray._raylet import GcsClient; "
    "print(sum(n.state == 0 for n in GcsClient('localhost:6379').get_all_node_info().values()))"
)


# Health conditions are left out, since podman's timers need systemd; and a busy machine starts Ray slowly.
_PATIENT = {"RAY_raylet_start_wait_time_s": "180"}
OVERRIDE = {
    "services": {
        "head": {"environment": _PATIENT},
        "worker": {"environment": _PATIENT, "depends_on": {"head": {"condition": "service_started"}}},
    }
}


@pytest.fixture(scope="module")
def cluster(images: Images) -> Iterator[Cluster]:
    """Up, with all its nodes there."""
    with sandbox(images) as box:
        override = images.folder / "override.yaml"
        override.write_text(yaml.safe_dump(OVERRIDE))
        up = Cluster(box, override)
        up.compose("up", "--detach", "--scale", "worker=2", *SERVICES)
        until(lambda: up.nodes() == 3, 300, "three nodes")
        yield up


def test_merged_config_is_what_was_meant(cluster: Cluster) -> None:
    merged = yaml.safe_load(cluster.compose("config"))["services"]
    assert merged["head"]["ports"] == ["127.0.0.1:8265:8265"]
    assert merged["worker"]["image"] == "raytune-ds:cpu"
    assert merged["worker"]["restart"] == "unless-stopped"


def test_all_are_healthy(cluster: Cluster) -> None:
    for name in (*cluster.names("head"), *cluster.names("worker")):
        until(lambda name=name: cluster.is_healthy(name), 60, f"{name} healthy")  # type: ignore[misc]


def test_metrics_of_every_node_are_where_prometheus_asks(cluster: Cluster) -> None:
    code = (
        "import socket, urllib.request\n"
        "for service in ('head', 'worker'):\n"
        "    for address in sorted({a[4][0] for a in socket.getaddrinfo(service, 8080)}):\n"
        "        page = urllib.request.urlopen(f'http://{address}:8080/metrics', timeout=20).read().decode()\n"
        "        print(service, 'ray_node_cpu_utilization' in page)\n"
    )
    until(lambda: cluster.on_head("python", "-c", code).count("True") == 3, 60, "metrics of three nodes")
    assert "default_grafana_dashboard.json" in cluster.on_head("ls", "/home/ray/dashboards")


def test_a_run_survives_a_killed_worker_container(cluster: Cluster) -> None:
    """And ends with the very losses and weights of one that nothing happened to."""
    assert f"finished: {STEPS} steps" in cluster.submit("calm")
    cluster.submit("rough", "--no-wait")
    until(lambda: max(cluster.losses("rough"), default=0) >= 12, 240, "twelve steps")
    victim = cluster.names("worker")[0]
    cluster.podman("kill", victim)
    until(lambda: cluster.nodes() == 2, 120, "the lost node noticed")
    cluster.podman("start", victim)
    until(lambda: '"status"' in cluster.read("rough/result.json"), 400, "the end of the run")
    result = json.loads(cluster.read("rough/result.json"))
    assert result["status"] == "finished"
    assert len(result["restarts"]) >= 1
    calm, rough = cluster.losses("calm"), cluster.losses("rough")
    assert rough == pytest.approx(calm, abs=1e-5)
    assert sorted(rough) == list(range(1, STEPS + 1))
    sums = cluster.on_head("python", "-c", COMPARE)
    assert float(sums) < 1e-5


COMPARE = """
from safetensors.torch import load_file
calm, rough = (load_file(f"/shared/raytune_ds/{name}/final/adapter_model.safetensors") for name in ("calm", "rough"))
assert calm.keys() == rough.keys()
print(max(float((calm[name] - rough[name]).abs().max()) for name in calm))
"""
