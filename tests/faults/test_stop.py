"""A run that is stopped in its middle, by `ray job stop` or Ctrl-C, goes on later as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raytune_ds import clustertoken
from raytune_ds.errors import Stopped
from tests.heads import Head, environment_with, run_here, start_head
from tests.helpers import Run, step_losses, write_jsonl

TOKEN = "5a" * 32
SECRET = "known-to-the-client-alone"
DEADLINE_S = 120
ROWS = [
    {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
    for i in range(60)
]
SETTINGS = (
    "data.sources=rows.jsonl",
    "data.seq_len=64",
    "data.eval.fraction=0",
    "scaling.num_workers=2",
    "train.global_batch=3",
    "train.max_steps=80",
    "train.learning_rate=1e-3",
    "checkpoint.every_steps=7",
)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """With its token where Ray looks for it: in a home directory, here one of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    with start_head({"HOME": str(home), "RAY_AUTH_MODE": "token"}) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is submitted; and where we are."""
    (tmp_path / "job").mkdir()
    write_jsonl(tmp_path / "job" / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path / "job")
    return tmp_path / "job"


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


def test_a_stopped_job_resumes_to_the_same_model(head: Head, folder: Path, tmp_path: Path, run: Run) -> None:
    """With a token, that workers find by themselves. And without the client's environment: it is nobody's business."""
    calm = run("run.name=calm", *SETTINGS)
    arguments = (*SETTINGS, f"run.storage={tmp_path}", "tracking.to=[]", "run.name=job")
    client = head.environment | {"HF_TOKEN": SECRET}
    options = ("--no-wait", "--submission-id", "first")
    submitted = head.submit(folder, *arguments, options=options, environment=client)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    _wait_for_lines(tmp_path / "job" / "metrics.jsonl", 12)
    processes = psutil.Process(head.pid).children(recursive=True)
    assert any("RayTrainWorker" in " ".join(process.cmdline()) for process in processes)
    assert not any(_knows_the_secret(process) for process in processes)
    _stop(head, "first")

    left = json.loads((tmp_path / "job" / "result.json").read_text())
    assert left["status"] == "stopped"
    assert 7 <= left["progress"]["step"] < 80
    log = json.loads(_ask(head, "first/logs"))["logs"]
    assert f"run.name=job resumes it after the checkpoint of step {left['progress']['step']}" in log
    assert "Traceback" not in log

    resumed = head.submit(folder, *arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming from the checkpoint of step" in resumed.stdout
    assert step_losses(str(tmp_path / "job")) == step_losses(calm.run)
    ours = resumed.stdout.split("Running entrypoint")[1].split("Job 'raysubmit")[0]
    assert "\r" not in ours
    assert "\x1b[?" not in ours


def test_ctrl_c_leaves_a_run_that_resumes(run: Run, folder: Path, tmp_path: Path) -> None:
    """Ray's own answer to Ctrl-C would end the process with code 0."""

    def interrupt() -> None:
        _wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        run("run.name=run", *SETTINGS)
    assert stopped.value.signal == signal.SIGINT
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"


CONNECT = """
from raytune_ds import cluster, command
raise SystemExit(command.guarded(lambda: cluster.connect(False), False))
"""
STRANGERS = {
    "no token": {"RAY_AUTH_MODE": "token"},
    "tokens off": {"RAY_AUTH_MODE": "disabled"},
    "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "6b" * 32},
}


@pytest.mark.parametrize("who", STRANGERS)
def test_who_has_not_got_the_token_is_told_so(who: str, head: Head, folder: Path, tmp_path: Path) -> None:
    stranger = environment_with({"HOME": str(tmp_path), **STRANGERS[who]})
    refused = run_here(["python", "-c", CONNECT], stranger | {"RAY_ADDRESS": head.gcs})
    assert refused.returncode == 2
    assert "wants its token" in refused.stderr
    assert clustertoken.HOW_TO_GIVE_IT.split(":")[0] in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_job_without_the_token_is_not_accepted(head: Head, folder: Path, tmp_path: Path) -> None:
    stranger = environment_with({"HOME": str(tmp_path), **STRANGERS["a wrong token"]})
    refused = head.submit(folder, environment=stranger)
    assert refused.returncode == 1
    assert "Invalid authentication token" in refused.stderr


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"])
def test_a_token_is_found_wherever_ray_looks(
    place: str, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN if place == "HOME" else "another")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    given = {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    settings = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)} | {
        k: v for k, v in given.items() if k == place
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in given.keys() - settings.keys():
        monkeypatch.delenv(name, raising=False)
    assert not clustertoken.is_refused(head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert clustertoken.is_refused(head.gcs)
