"""A Ray head that `ray start` made on this machine, and jobs submitted to it as the README has it."""

from __future__ import annotations

import contextlib
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

READY_S = 90
JOB_S = 240
BIN = Path(sys.executable).parent
_OURS_TO_SAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class Head:
    """A Ray head of our own, beside the session's Ray.

    Attributes:
        dashboard: its URL, where jobs are submitted.
        gcs: host:port, where drivers connect.
        environment: of those who belong to it.
        pid: of `ray start`.
    """

    dashboard: str
    gcs: str
    environment: dict[str, str]
    pid: int

    def submit(
        self,
        folder: Path,
        *arguments: str,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a training from `folder`; by someone with another environment, if one is given."""
        command = [
            "ray",
            "job",
            "submit",
            "--address",
            self.dashboard,
            *options,
            "--working-dir",
            str(folder),
            "--",
        ]
        return run_here(
            [*command, "python", "-m", "raytune_ds.train", *arguments], environment or self.environment
        )


def run_here(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command line's output and exit code."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=JOB_S, check=False
    )


def environment_with(settings: dict[str, str]) -> dict[str, str]:
    """Ours with other settings, none for Ray's address and tokens but them; `python` is that of the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS_TO_SAY}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | settings


@contextlib.contextmanager
def start_head(settings: dict[str, str]) -> Iterator[Head]:
    """Ports and a folder of its own, so that two clusters on one machine do not meet.

    Args:
        settings: environment variables of the head and its clients.
    """
    folder = tempfile.mkdtemp(prefix="rt")  # short: socket paths below it have 107 characters at most
    gcs, dashboard = _free_port(), _free_port()
    environment = environment_with(settings)
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
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, process.pid)
        finally:
            process.terminate()
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"ray start ended with {process.wait(0.2)}")
    raise TimeoutError(f"no dashboard after {READY_S} s")
