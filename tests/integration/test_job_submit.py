"""`ray job submit` to a cluster that `ray start --head` made on this machine, as the README has it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import step_losses, write_jsonl

READY_S = 90
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A Ray head of our own, beside the session's Ray."""

    dashboard: str
    environment: dict[str, str]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Ports and a folder of its own, so that two clusters on one machine do not meet."""
    folder = tempfile.mkdtemp(prefix="rt")  # short: socket paths below it have 107 characters at most
    gcs, dashboard = _free_port(), _free_port()
    # Tokens off on both sides: whether this user has one must not decide a test. And `python` is this one.
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    command = [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += [
        "--dashboard-agent-listen-port=0",
        "--num-cpus=2",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(dashboard, process)
            yield Head(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            process.terminate()
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"ray start ended with {process.wait(0.2)}")
    raise TimeoutError(f"no dashboard after {READY_S} s")


def _submit(head: Head, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--address", head.dashboard, "--working-dir", folder, "--"]
    command += ["python", "-m", "raytune_ds.train", *arguments]
    return subprocess.run(
        command, env=head.environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_submitted_job_trains_and_its_log_reads_well(head: Head, tmp_path: Path) -> None:
    """Config and data travel with the working directory; the run goes to shared storage."""
    folder, storage = tmp_path / "job", tmp_path / "storage"
    folder.mkdir()
    rows = [{"prompt": f"count to {i}", "completion": " ".join(map(str, range(i)))} for i in range(2, 40)]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "my.yaml").write_text(
        "data: {sources: rows.jsonl, seq_len: 128}\ntrain: {max_steps: 12, global_batch: 4}\n"
    )
    done = _submit(head, folder, "--config", "my.yaml", f"run.storage={storage}", "run.name=job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(step_losses(str(storage / "job"))) == 12
    assert json.loads((storage / "job" / "result.json").read_text())["num_workers"] == 2
    log = done.stdout
    for words in ("on the Ray cluster at", "training steps 1 to 12", "finished: 12 steps", "saved:"):
        assert words in log
    assert "Traceback" not in log
    assert "RayTrainWorker" not in log, "libraries' lines drown ours"


def test_a_mistake_fails_the_job_with_our_message(head: Head, tmp_path: Path) -> None:
    """Not with a stack of Ray's."""
    folder = tmp_path / "job"
    folder.mkdir()
    failed = _submit(head, folder, "data.sources=missing.jsonl", f"run.storage={tmp_path}")
    assert failed.returncode != 0
    assert "missing.jsonl" in failed.stdout
    assert "no such file" in failed.stdout
    assert "Traceback" not in failed.stdout.split("Job submission server address")[0]
