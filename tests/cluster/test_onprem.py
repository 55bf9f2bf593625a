"""The shipped on-prem file of `ray up`, on machines with addresses and links of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import SHARED, Machine, World, new_world, wait_until
from tests.cluster.rayup import Cluster, ray_up, rendered
from tests.helpers import step_losses, write_jsonl

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("machines"), pytest.mark.timeout(900)]

HEAD, WORKERS = "10.99.0.10", ("10.99.0.11", "10.99.0.12")
CPUS = (
    os.cpu_count() or 1
) + 1  # one more than the head says it has: a worker that wants them all fits on no other
JOB_S = 420
CUT_S = 45.0
GONE_S = 150
NUM_STEPS = 150
RESUMED = "resuming from the checkpoint of step"
SETTINGS = (
    *("data.sources=rows.jsonl", "data.seq_len=64", "data.eval.fraction=0", f"run.storage={SHARED}/runs"),
    *("scaling.num_workers=2", f"scaling.cpus_per_worker={CPUS}", "checkpoint.every_steps=10"),
    *("train.global_batch=3", f"train.max_steps={NUM_STEPS}", "train.learning_rate=1e-3", "tracking.to=[]"),
)


@pytest.fixture(scope="module")
def world(machines: None) -> Iterator[World]:
    """A desk, a head and two nodes."""
    with new_world() as world:
        for name, address in zip(("desk", "head", "n1", "n2"), ("10.99.0.2", HEAD, *WORKERS), strict=True):
            world.add(name, address)
        yield world


@pytest.fixture(scope="module")
def cluster(world: World) -> Iterator[Cluster]:
    """Up by the file as it is rendered; nothing is left of it when it is down."""
    desk, head, *nodes = world.machines
    file = world.folder / "onprem.yaml"
    file.write_text(
        rendered(
            "onprem",
            *(f"cluster.onprem.head={HEAD}", f"cluster.onprem.workers=[{','.join(WORKERS)}]"),
            *("cluster.onprem.ssh_user=root", f"cluster.onprem.ssh_key={world.key}"),
            *("cluster.onprem.docker=false", f"cluster.shared_dir={SHARED}"),
            *(f"cluster.cpus_per_node={CPUS}", "cluster.gpus_per_node=0", "cluster.memory_gib_per_node=4"),
        )
    )
    with ray_up(desk, head, file, RAY_UP_enable_autoscaler_v2="0") as cluster:
        print(f"ray up: {cluster.up_s:.0f} s; three nodes {cluster.wait_for_nodes(3):.0f} s later")
        yield cluster
        started = time.monotonic()
    print(f"ray down: {time.monotonic() - started:.0f} s")
    # It stops the head's Ray. The others notice within a minute that they have none, and end by themselves, but for
    # their log monitors, which read files and no more.
    took = wait_until("Ray has ended", lambda: not any(map(_rest, (head, *nodes))), GONE_S)
    print(f"the nodes' Ray ended {took:.0f} s later")
    for node in nodes:
        node.run("ray", "stop")
        assert node.names() <= {"sshd"}, "something stays for ever"


def _rest(machine: Machine) -> set[str]:
    """What runs on a machine besides its sshd and the log monitor."""
    monitors = [
        p for p in machine.processes("python") if any("log_monitor.py" in part for part in p.cmdline())
    ]
    return machine.names() - {"sshd", *(["python"] if monitors == machine.processes("python") else [])}


@pytest.fixture(scope="module")
def job(world: World) -> Path:
    """What `--working-dir` takes along."""
    folder = world.folder / "job"
    folder.mkdir()
    rows = [
        {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
        for i in range(60)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def calm(world: World, cluster: Cluster, job: Path) -> list[float]:
    """The losses of an undisturbed run, a worker on each node."""
    log = world.folder / "calm.log"
    submitted = cluster.submit(job, log, *SETTINGS, "run.name=calm")
    run = world.shared / "runs" / "calm"
    _wait_for_step(run, 5)
    for node in world.machines[2:]:
        assert len(node.processes("ray::RayTrainWorker")) == 1, f"no worker of the run on {node.name}"
    assert submitted.wait(JOB_S) == 0, log.read_text()
    return step_losses(str(run))


def _last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _wait_for_step(run: Path, step: int) -> None:
    wait_until(f"{run.name} comes to step {step}", lambda: _last_step(run) >= step, JOB_S)


def _wait_for_resume(log: Path, times: int) -> float:
    return wait_until(f"it resumes, {times}", lambda: log.read_text().count(RESUMED) >= times, JOB_S)


def test_a_run_on_two_nodes_trains(calm: list[float]) -> None:
    """A worker on each, gloo between them, with no interface set by hand."""
    assert len(calm) == NUM_STEPS
    assert calm[-1] < calm[0]


def test_a_killed_raylet_and_a_cut_link_cost_only_time(
    world: World, cluster: Cluster, job: Path, calm: list[float]
) -> None:
    """Both in one run: to the bit the losses of the undisturbed one, each step once."""
    _, _, first, second = world.machines
    run, log = world.shared / "runs" / "disturbed", world.folder / "disturbed.log"
    submitted = cluster.submit(job, log, *SETTINGS, "run.name=disturbed")
    _wait_for_step(run, 15)
    (raylet,) = first.processes("raylet")
    raylet.kill()
    print(f"resumed {_wait_for_resume(log, 1):.0f} s after the kill of a raylet")
    _wait_for_step(run, 40)
    second.cut()
    time.sleep(CUT_S)  # this is how long it is cut
    second.mend()
    print(f"resumed {CUT_S + _wait_for_resume(log, 2):.0f} s after the cut of a link")
    assert submitted.wait(JOB_S) == 0, log.read_text()
    assert step_losses(str(run)) == calm
    assert len(json.loads((run / "result.json").read_text())["restarts"]) == 2


def test_a_wrong_interface_is_named(world: World, cluster: Cluster, job: Path) -> None:
    """One that the user has set, before anything is trained."""
    log = world.folder / "wrong.log"
    wrong = json.dumps({"env_vars": {"GLOO_SOCKET_IFNAME": "eth7"}})
    submitted = cluster.submit(job, log, *SETTINGS, "run.name=wrong", options=("--runtime-env-json", wrong))
    assert submitted.wait(JOB_S) != 0
    assert "GLOO_SOCKET_IFNAME = eth7: there is no such network interface; there is eth0" in log.read_text()
    assert not (world.shared / "runs" / "wrong").exists()


def test_a_head_that_is_cut_off_is_said_so(world: World, cluster: Cluster) -> None:
    """At once, where its address can't be reached at all."""
    desk, head = world.machines[:2]
    address = f"{head.address}:6379"
    head.cut()
    try:
        refused = desk.run("python", "-m", "raytune_ds.train", check=False, RAY_ADDRESS=address)
    finally:
        head.mend()
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f"RAY_ADDRESS = {address}: no Ray cluster answers there" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
