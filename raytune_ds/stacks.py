"""The stacks of workers that hang: each node's processes are asked for them, and write them themselves."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

SIGNAL = signal.SIGUSR2
WAIT_S = 3.0
"""That a process has to write its stack: it takes milliseconds unless the machine is very busy."""


@dataclass(frozen=True)
class Place:
    """A worker's process: Ray's id of its node, its number there, and the file that its stacks go to."""

    node: str
    pid: int
    file: str


@contextlib.contextmanager
def on_demand(node: str) -> Iterator[Place]:
    """Makes this process write the stacks of all its threads when it gets SIGNAL, whatever it is stuck in.

    Python's own handlers wait for the interpreter; that of faulthandler does not need it.
    """
    handle, name = tempfile.mkstemp(prefix="raytune-stacks-")
    faulthandler.register(SIGNAL, file=handle, all_threads=True)
    try:
        yield Place(node, os.getpid(), name)
    finally:
        faulthandler.unregister(SIGNAL)
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def of_each(places: Mapping[int, Place]) -> dict[int, str]:
    """The stacks of some processes of this node by rank; where there are none, why."""
    return {rank: _of(place) for rank, place in places.items()}


def kill_each(places: Mapping[int, Place]) -> None:
    """Ends them at once. They may hang in what no other signal interrupts."""
    for place in places.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(place.pid, signal.SIGKILL)
        Path(place.file).unlink(missing_ok=True)


def _of(place: Place) -> str:
    try:
        process = psutil.Process(place.pid)
        state = f"process {place.pid}, {process.status()}\n"
        process.send_signal(SIGNAL)
        if not (text := _read(place.file)) and process.status() == psutil.STATUS_STOPPED:
            process.resume()
            text = _read(place.file)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return f"process {place.pid} is gone\n"
    return state + (text or f"it did not write its stacks within {WAIT_S:.0f}s\n")


def _read(file: str) -> str:
    """What a process writes there, once nothing is added any more."""
    text, end = "", time.monotonic() + WAIT_S
    while time.monotonic() < end:
        time.sleep(0.1)
        now = Path(file).read_text(encoding="utf-8", errors="replace")
        if now and now == text:
            break
        text = now
    return text
