"""A Ray head as `ray start --head` makes it, beside the session's Ray."""

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
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """Where it is.

    Attributes:
        address: for drivers.
        dashboard: for jobs.
        folder: of its sessions.
        environment: for commands that talk to it.
    """

    address: str
    dashboard: str
    folder: Path
    environment: dict[str, str]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def ray_head() -> Iterator[Head]:
    """Ports and a folder of its own, so that two clusters on one machine do not meet."""
    folder = tempfile.mkdtemp(prefix="rt")  # short: socket paths below it have 107 characters at most
    gcs, dashboard = free_port(), free_port()
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
            wait_for_port(dashboard, process)
            yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", Path(folder), environment)
        finally:
            process.terminate()
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


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
