"""A run that is stopped in its middle, by `ray job stop` or Ctrl-C, goes on later as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from ray.util.placement_group import placement_group_table

from raytune_ds.errors import Stopped
from tests.conftest import TOKEN
from tests.faults.conftest import ROWS, SETTINGS
from tests.head import Head, environment_with, run_here
from tests.helpers import Run, step_losses, write_jsonl

SECRET = "known-to-the-client-alone"
DEADLINE_S = 120


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is submitted; and where we are."""
    (tmp_path / "sent").mkdir()
    write_jsonl(tmp_path / "sent" / "rows.jsonl", ROWS)
    (tmp_path / "sent" / "my.yaml").write_text("data: {sources: rows.jsonl}\n")
    monkeypatch.chdir(tmp_path / "sent")
    return tmp_path / "sent"


def _wait_for_lines(file: Path, num_lines: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while not file.exists() or file.read_bytes().count(b"\n") < num_lines:
        assert time.monotonic() < end, f"{file} has not got {num_lines} lines"
        threading.Event().wait(0.02)


def _ask(head: Head, path: str, method: str = "GET") -> bytes:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/{path}", method=method)
    request.add_header("Authorization", f"Bearer {TOKEN}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def _stop(head: Head, job: str) -> None:
    """What `ray job stop` does, without the seconds that its start takes."""
    _ask(head, f"{job}/stop", "POST")
    end = time.monotonic() + DEADLINE_S
    while (status := json.loads(_ask(head, job))["status"]) == "RUNNING":
        assert time.monotonic() < end
        threading.Event().wait(0.1)
    assert status == "STOPPED"


def _knows_the_secret(process: psutil.Process) -> bool:
    return SECRET in process.environ().values()


def test_ctrl_c_leaves_a_run_that_resumes(run: Run, folder: Path, tmp_path: Path) -> None:
    """Ray's own answer to Ctrl-C would end the process with code 0."""

    def interrupt() -> None:
        _wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        run("run.name=run", "data.sources=rows.jsonl", *SETTINGS)
    assert stopped.value.signal == signal.SIGINT
    held = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert held == [], "the next run of this process would wait for these places"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"


def test_a_stopped_job_resumes_to_the_same_model(
    token_head: Head, folder: Path, tmp_path: Path, calm_losses: list[float]
) -> None:
    """With a token, that workers find by themselves. And without the client's environment: it is nobody's business.

    Config and data travel with the working directory; the run goes to shared storage; what is logged reads well.
    """
    settings = (*SETTINGS, "scaling.num_workers=auto", f"run.storage={tmp_path}", "run.name=job")
    arguments = ("--config", "my.yaml", *settings)
    client = token_head.environment | {"HF_TOKEN": SECRET}
    options = ("--no-wait", "--submission-id", "first")
    submitted = token_head.submit(folder, *arguments, options=options, environment=client)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    _wait_for_lines(tmp_path / "job" / "checkpoints" / "step-00000007" / "manifest.json", 1)
    processes = psutil.Process(token_head.pid).children(recursive=True)
    assert any("RayTrainWorker" in " ".join(process.cmdline()) for process in processes)
    assert not any(_knows_the_secret(process) for process in processes)
    _stop(token_head, "first")

    left = json.loads((tmp_path / "job" / "result.json").read_text())
    assert left["status"] == "stopped"
    assert 7 <= left["progress"]["step"] < len(calm_losses)
    log = json.loads(_ask(token_head, "first/logs"))["logs"]
    assert "training steps 1 to 160" in log
    assert f"run.name=job resumes it after the checkpoint of step {left['progress']['step']}" in log
    assert "Traceback" not in log

    resumed = token_head.submit(folder, *arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming from the checkpoint of step" in resumed.stdout
    assert step_losses(str(tmp_path / "job")) == calm_losses
    assert json.loads((tmp_path / "job" / "result.json").read_text())["num_workers"] == 2
    for words in ("on the Ray cluster at", "finished: 160 steps", "saved:"):
        assert words in resumed.stdout
    assert "Traceback" not in resumed.stdout
    assert "RayTrainWorker" not in resumed.stdout, "libraries' lines drown ours"
    ours = resumed.stdout.split("Running entrypoint")[1].split("Job 'raysubmit")[0]
    assert "\r" not in ours
    assert "\x1b[?" not in ours


def test_a_driver_that_is_killed_keeps_no_places(token_head: Head, folder: Path, tmp_path: Path) -> None:
    """All CPUs were its workers': the next one would wait for ever."""
    command = [sys.executable, "-m", "raytune_ds.train", "--config", "my.yaml"]
    command += [*SETTINGS, f"run.storage={tmp_path}", "run.name=killed", "train.max_steps=1000000"]
    environment = token_head.environment | {"RAY_ADDRESS": token_head.address}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    _wait_for_lines(tmp_path / "killed" / "metrics.jsonl", 10)
    first.kill()
    first.wait()
    second = run_here([*command, "run.name=next", "train.max_steps=5"], environment)
    assert second.returncode == 0, second.stdout + second.stderr


def test_a_job_without_the_token_is_not_accepted(token_head: Head, folder: Path, tmp_path: Path) -> None:
    stranger = environment_with(
        {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "6b" * 32}
    )
    refused = token_head.submit(folder, environment=stranger)
    assert refused.returncode == 1
    assert "Invalid authentication token" in refused.stderr
