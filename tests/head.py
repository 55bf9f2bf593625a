"""A Ray head as `ray start --head` makes it, beside the session's Ray, and jobs submitted as the README has it."""

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

READY_S = 120
JOB_S = 240
BIN = Path(sys.executable).parent
_BLOCKS = "This command will now block"  # what `ray start --block` says when all is up
TOKENS_OFF = {"RAY_AUTH_MODE": "disabled"}
_OURS_TO_SAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class Head:
    """Where it is.

    Attributes:
        address: for drivers.
        dashboard: for jobs.
        folder: of its sessions.
        environment: of those who belong to it.
        pid: of `ray start`.
    """

    address: str
    dashboard: str
    folder: Path
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
        ]
        command += ["--", "python", "-m", "raytune_ds.train", *arguments]
        return run_here(command, environment or self.environment)


def run_here(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command line's output and exit code."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=JOB_S, check=False
    )


def environment_with(settings: dict[str, str]) -> dict[str, str]:
    """Ours with other settings, none for Ray's address and tokens but them; `python` is that of the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS_TO_SAY}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | settings


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def ray_head(settings: dict[str, str]) -> Iterator[Head]:
    """Ports and a folder of its own, so that two clusters on one machine do not meet.

    Args:
        settings: environment variables of the head and its clients, about tokens above all: whether this user has one
            must not decide a test.
    """
    folder = tempfile.mkdtemp(prefix="rt")  # short: socket paths below it have 107 characters at most
    gcs, dashboard = free_port(), free_port()
    # Nobody waits for half a minute until a head that is no longer needed has drained.
    environment = environment_with(settings | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"})
    command = [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"]
    command += ["--num-cpus=2", f"--temp-dir={folder}", "--disable-usage-stats"]
    log = Path(folder) / "ray-start.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_for_port(dashboard, process)
            _wait_until_it_is_through(process, log)
            yield Head(
                f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", Path(folder), environment, process.pid
            )
        finally:
            process.terminate()
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_is_through(process: subprocess.Popen[bytes], log: Path) -> None:
    """The dashboard answers before `ray start` knows whether its node has come up."""
    end = time.monotonic() + READY_S
    while _BLOCKS not in log.read_text(errors="replace"):
        assert time.monotonic() < end
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.2)
            raise AssertionError(f"ray start ended with {code}:\n{log.read_text(errors='replace')[-2000:]}")


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the process listens there."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"{process.args} ended with {process.wait(0.2)}")
    raise TimeoutError(f"nothing listens on port {port} after {READY_S} s")
