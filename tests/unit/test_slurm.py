"""The Slurm script, run by bash; `srun`, `scontrol`, `ray` and `python` are stand-ins that write down what they hear.

What is tested is the script's own work: order, arguments, exit codes, the signal. Slurm and Ray are not.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ds.compose import compose
from raytune_ds.deploy.render import render

DEADLINE_S = 60
STAND_INS = {
    # Runs the command here, once, whatever the number of nodes.
    "srun": 'echo "srun $*" >> calls; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> calls; [ "$1" != show ] || printf "%s\\n" node1 node2 node3',
    "ray": """
        echo "ray $*" >> calls
        if [ "$1" = health-check ]; then [ -e head_is_up ]; exit; fi
        [ ! -e head_fails ] || exit 1
        trap 'echo "ray ended" >> calls; exit 0' TERM
        [ "$2" != --head ] || touch head_is_up
        while :; do read -r -t 0.1 < keep_waiting || true; done""",
    "python": f"""
        case "$*" in
            *get_node_ip_address*) echo 10.0.0.1 ;;
            -c*) exec {sys.executable} "$@" ;;
            "- "*) cat > joined.py; echo "python joined $2 ${{#RAY_AUTH_TOKEN}} $RAY_AUTH_MODE" >> calls ;;
            *)
                cp "$4" run.yaml; shift 4; echo "train $*" >> calls
                trap 'echo "train ended" >> calls; exit 143' TERM
                touch training
                while [ ! -e train_exits ]; do read -r -t 0.1 < keep_waiting || true; done
                exit "$(cat train_exits)" ;;
        esac""",
}


class Job:
    """A job of Slurm in `place`."""

    def __init__(self, place: Path, overrides: list[str], arguments: list[str]) -> None:
        self._place = place
        (place / "bin").mkdir()
        os.mkfifo(place / "keep_waiting")
        for name, body in STAND_INS.items():
            (place / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (place / "bin" / name).chmod(0o755)
        config = compose([], ["cluster.slurm.activate=null", *overrides])
        (place / "slurm.sh").write_text(render(config, "slurm")[0])
        nodes = re.findall(r"#SBATCH --nodes=(\d+)", (place / "slurm.sh").read_text())[0]
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_CPUS_PER_TASK": "8",
        }
        # A writer keeps the pipe open, so that reads of it wait.
        self._pipe = os.open(place / "keep_waiting", os.O_RDWR)
        self.process = subprocess.Popen(
            ["bash", "slurm.sh", *arguments],
            cwd=place,
            env={**os.environ, **slurm, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ends_with(self) -> int:
        """Its exit code; what it said is in `said`."""
        self.said, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode

    @property
    def calls(self) -> list[str]:
        """What the stand-ins were told so far."""
        return (self._place / "calls").read_text().splitlines()

    def put(self, name: str, text: str = "") -> None:
        """A file that a stand-in looks at."""
        (self._place / name).write_text(text)

    def wait_for(self, name: str) -> None:
        """Until a stand-in has made that file."""
        until = time.monotonic() + DEADLINE_S
        while not (self._place / name).exists():
            assert time.monotonic() < until, f"no {name} after {DEADLINE_S} s"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def read(self, name: str) -> str:
        """What a stand-in has written."""
        return (self._place / name).read_text()

    def end(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._pipe)


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A job on three nodes, or one with other settings."""
    started = Job(tmp_path, *getattr(request, "param", (["scaling.num_workers=3"], ["adapter.r=4", "a=b c"])))
    yield started
    started.end()


def test_a_run_from_start_to_end(job: Job) -> None:
    """The head, then the others, then the run, once, and all of it ends."""
    job.put("train_exits", "0")
    assert job.ends_with() == 0, job.said
    said = [call for call in job.calls if not call.startswith("ray health-check")]
    order = [
        "scontrol show hostnames node[1-3]",
        "srun --nodes=1 ",
        "ray start --head --port=",
        "srun --nodes=2 ",
    ]
    assert [call.startswith(words) for call, words in zip(said, order, strict=False)] == [True] * 4
    head, others = (next(c for c in said if c.startswith(f"srun --nodes={n} ")) for n in (1, 2))
    assert "--nodelist=node1 --ntasks-per-node=1 --cpus-per-task=8 --gpus-per-node=1 ray start --head" in head
    assert "--ntasks=2 --exclude=node1 --ntasks-per-node=1" in others
    port = re.findall(r"--port=(\d+)", head)[0]
    assert f"ray start --address=10.0.0.1:{port} --temp-dir=/tmp/ray-4711" in others
    assert "python joined 3 64 token" in said
    assert "train run.name=slurm-4711 adapter.r=4 a=b c" in said
    assert job.read("run.yaml").splitlines()[:2] == ["scaling:", "  num_workers: 3"]
    assert said.count("ray ended") == 2
    assert "scontrol requeue 4711" not in said


def test_the_waiting_for_nodes_is_python(job: Job) -> None:
    """It is run by a stand-in here, so at least it has to compile."""
    job.put("train_exits", "0")
    assert job.ends_with() == 0
    compile(job.read("joined.py"), "joined.py", "exec")


def test_a_failed_run_fails_the_job(job: Job) -> None:
    """With its exit code; it is not queued again."""
    job.put("train_exits", "2")
    assert job.ends_with() == 2
    assert "scontrol requeue 4711" not in job.calls


def test_stops_and_is_queued_again_when_its_time_is_up(job: Job) -> None:
    """The run is told first, Ray afterwards."""
    job.wait_for("training")
    job.process.send_signal(signal.SIGUSR1)
    assert job.ends_with() == 143
    assert job.calls[-4:].count("ray ended") == 2
    assert job.calls.index("train ended") < job.calls.index("ray ended")
    assert job.calls[-1] == "scontrol requeue 4711"


def test_is_not_queued_again_when_it_is_cancelled(job: Job) -> None:
    """The run is told all the same."""
    job.wait_for("training")
    job.process.send_signal(signal.SIGTERM)
    assert job.ends_with() == 143
    assert "train ended" in job.calls
    assert not any(call.startswith("scontrol requeue") for call in job.calls)


@pytest.mark.parametrize(
    "job", [(["scaling.num_workers=1", "run.name=mine", "cluster.gpus_per_node=0"], [])], indirect=True
)
def test_one_node_and_a_name(job: Job) -> None:
    """No second `srun`, and the run's own name."""
    job.put("train_exits", "0")
    assert job.ends_with() == 0
    assert sum(call.startswith("srun ") for call in job.calls) == 1
    assert "train " in job.calls
    assert "  name: mine" in job.read("run.yaml").splitlines()
    assert not any("--gpus-per-node" in call for call in job.calls)


def test_a_head_that_does_not_come_up_is_said(tmp_path: Path) -> None:
    """Soon, not after the deadline."""
    (tmp_path / "head_fails").touch()
    failed = Job(tmp_path, [], [])
    try:
        assert failed.ends_with() == 1
        assert "slurm: the head of Ray ended" in failed.said
        assert not any(call.startswith("train") for call in failed.calls)
    finally:
        failed.end()


def test_neighbours_share_no_port() -> None:
    """Jobs that Slurm numbers one after the other, also where numbers grow large."""
    text = render(compose([], []), "slurm")[0]
    formula = re.findall(r"^port=\$\(\((.*)\)\)$", text, re.MULTILINE)[0]
    ports = [
        int(
            subprocess.run(
                ["bash", "-c", f"SLURM_JOB_ID={job}; echo $(({formula}))"], capture_output=True
            ).stdout
        )
        for job in (1, 2, 1199, 1200, 9_999_999, 10_000_000)
    ]
    assert len(set(ports)) == len(ports)
    assert all(port > 1024 and port + 9 < 32768 for port in ports)
    assert min(abs(a - b) for a in ports for b in ports if a != b) >= 4
