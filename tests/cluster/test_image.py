"""The images, built from docker/Dockerfile without an engine, and run as their own user.

The CUDA image's steps are run on the same small base and with whatever torch this machine's pip finds: what is checked
is that they work, not CUDA.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ds.console import say
from tests.cluster.containers import Images, Sandbox, sandbox, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
TARGETS = ("cpu", "cuda")
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "nvcc", "ninja")
TRAIN = ("python", "-m", "raytune_ds.train", "run.name=first", "data.seq_len=128", "scaling.num_workers=2")


@pytest.fixture(scope="module")
def box(images: Images) -> Iterator[Sandbox]:
    """Where the containers run; without any network but their own loopback."""
    with sandbox(images) as inside:
        yield inside


def _run(box: Sandbox, target: str, *command: str, options: tuple[str, ...] = ()) -> str:
    # A busy machine starts Ray slowly.
    patient = "--env=RAY_raylet_start_wait_time_s=180"
    common = ("run", "--rm", "--network=none", "--init", "--shm-size=1g", patient, *options)
    return box.podman(*common, f"raytune-ds:{target}", *command)


def _shell(box: Sandbox, target: str, script: str) -> str:
    return _run(box, target, "bash", "-c", script)


def _config(images: Images, target: str) -> dict[str, object]:
    return json.loads(images.buildah("inspect", "--type=image", f"raytune-ds:{target}"))["Docker"]["config"]


# ------------------------------------------------------------------------------------------ what it is made of


def test_sizes_by_layer_are_told(images: Images, box: Sandbox) -> None:
    for target in TARGETS:
        layers = box.podman(
            "history", "--format={{.Size}}\t{{.CreatedBy}}", f"raytune-ds:{target}"
        ).splitlines()
        large = [f"{line[:110]}" for line in layers if "MB" in line or "GB" in line]
        total = int(box.podman("image", "inspect", "--format={{.Size}}", f"raytune-ds:{target}"))
        say(f"raytune-ds:{target}: {total / 1e6:,.0f} MB\n  " + "\n  ".join(large))
        assert large


@pytest.mark.parametrize("target", TARGETS)
def test_config_of_the_image(images: Images, target: str) -> None:
    config = _config(images, target)
    assert config["User"] == "1000"
    assert config["Healthcheck"]["Test"] == ["CMD", "ray", "health-check"]  # type: ignore[index]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"  # type: ignore[index]
    assert target.upper() in labels["org.opencontainers.image.description"]  # type: ignore[index]
    assert "PIP_ARGS" not in json.dumps(config["Env"])


@pytest.mark.parametrize("target", TARGETS)
def test_user_and_what_is_theirs(box: Sandbox, target: str) -> None:
    said = _shell(
        box,
        target,
        "id -u; pwd; touch x /shared/x ~/dashboards/x && echo mine; touch /opt/venv/x || echo not",
    )
    assert said.split() == ["1000", "/home/ray", "mine", "not"]


@pytest.mark.parametrize("target", TARGETS)
def test_login_shells_find_ray_too(box: Sandbox, target: str) -> None:
    """KubeRay and `ray up` start Ray from one."""
    assert "raytune-ds" in _run(
        box, target, "bash", "-lc", "ray --version && which raytune-ds rsync ssh wget"
    )


def test_only_the_cuda_image_has_cuda_extras_and_a_c_compiler(box: Sandbox) -> None:
    script = "pip list --format=freeze | grep -E '^liger.kernel=='; which gcc; which c++; true"
    assert _shell(box, "cpu", script) == ""
    said = _shell(box, "cuda", script)
    assert "liger" in said
    assert said.splitlines()[-1] == "/usr/bin/gcc"


@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_as_locked(box: Sandbox, target: str) -> None:
    root = Path(__file__).parents[2]
    pins: dict[str, str] = {}
    for file in ("requirements.lock", "docker/constraints.txt"):
        for line in (root / file).read_text().splitlines():
            if not line.startswith("#"):
                name, version = line.split("==")
                pins[name.lower().replace("_", "-")] = version
    assert "No broken requirements" in _run(box, target, "pip", "check")
    for line in _run(box, target, "pip", "list", "--format=freeze").splitlines():
        name, version = line.split("==")
        name = name.lower().replace("_", "-")
        if name in pins:
            assert version.partition("+")[0] == pins[name], name


def test_nothing_of_the_build_machine_stays(box: Sandbox) -> None:
    """The place where its pip settings were mounted is there, and empty."""
    places = "/etc/pip.conf /root/.cache /var/lib/apt/lists"
    assert _shell(box, "cuda", f"find {places} -type f -size +0 2> /dev/null; true").split() == []


# -------------------------------------------------------------------------------------------- what it does


def test_it_trains(box: Sandbox) -> None:
    said = _run(box, "cpu", *TRAIN, "train.max_steps=12", "train.global_batch=4")
    assert "2 CPU worker(s) on an embedded Ray" in said
    assert "finished: 12 steps" in said
    assert "saved: /home/ray/raytune_ds/first/final" in said


@pytest.mark.parametrize("target", TARGETS)
def test_no_compiler_runs_at_the_first_step_with_offload(box: Sandbox, images: Images, target: str) -> None:
    """Every compiler is a stand-in that fails and writes down that it was called."""
    folder = images.folder / f"compilers-{uuid.uuid4().hex}"
    folder.mkdir()
    for name in COMPILERS:
        (folder / name).write_text('#!/bin/sh\necho "$0 $@" >> /home/ray/called\nexit 1\n')
        (folder / name).chmod(0o755)
    options = (f"--volume={folder}:/stand-in:ro", "--env=PATH=/stand-in:/opt/venv/bin:/usr/bin:/bin")
    offload = "adapter.kind=none engine.kind=zero engine.stage=2 engine.offload=optimizer"
    train = f"{' '.join(TRAIN)} {offload} train.max_steps=2 train.global_batch=4"
    script = f"{train} && cat ~/called; ls ~/.cache/torch_extensions; true"
    said = _run(box, target, "bash", "-c", script, options=options)
    assert "finished: 2 steps" in said
    assert "/stand-in/" not in said
    assert "cpu_adam" not in said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_op_is_there_for_either_device(box: Sandbox, device: str) -> None:
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; print(CPUAdamBuilder().load(verbose=False).__file__)"
    said = _run(
        box,
        "cuda",
        "python",
        "-c",
        code,
        options=(f"--env=DS_ACCELERATOR={device}", "--env=DS_IGNORE_CUDA_DETECTION=1"),
    )
    assert said.splitlines()[-1].startswith("/opt/venv/lib/")


def test_health_is_that_of_its_ray(box: Sandbox) -> None:
    """The container's own command is a head; without a Ray it is not healthy."""
    start = ("run", "--detach", "--network=none", "--init", "--shm-size=1g", "raytune-ds:cpu")
    head, idle = box.podman(*start).strip(), box.podman(*start, "sleep", "infinity").strip()
    try:
        until(lambda: _is_healthy(box, head), 180, "healthy")
        assert not _is_healthy(box, idle)
    finally:
        box.podman("rm", "--force", "--time=0", head, idle)


def _is_healthy(box: Sandbox, name: str) -> bool:
    try:
        box.podman("healthcheck", "run", name)
    except RuntimeError:
        return False
    return True
