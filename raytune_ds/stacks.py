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
"""That processes have to write their stacks: it takes milliseconds unless the machine is very busy."""


@dataclass(frozen=True)
class Place:
    """A worker's process.

    Attributes:
        node: Ray's id of its node.
        pid: its number there.
        started: when it did, in seconds since the epoch, which tells it from others that get its number.
        file: that its stacks go to.
    """

    node: str
    pid: int
    started: float
    file: str

    @property
    def state(self) -> str | None:
        """Of the process, asked on its own node; None if it is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            state = str(process.status())
            if abs(process.create_time() - self.started) < 1.0 and state != psutil.STATUS_ZOMBIE:
                return state
        return None


@contextlib.contextmanager
def on_demand(node: str) -> Iterator[Place]:
    """Makes this process write the stacks of all its threads when it gets SIGNAL, whatever it is stuck in.

    Python's own handlers wait for the interpreter; that of faulthandler does not need it. It stays in place, with its
    open file: without it a signal that comes late would end the process.
    """
    handle, name = tempfile.mkstemp(prefix="raytune-stacks-")
    faulthandler.register(SIGNAL, file=handle, all_threads=True)
    try:
        yield Place(node, os.getpid(), psutil.Process().create_time(), name)
    finally:
        Path(name).unlink(missing_ok=True)


def of_each(places: Mapping[int, Place]) -> dict[int, str]:
    """The stacks of some processes of this node by rank; where there are none, why."""
    states = {rank: state for rank, place in places.items() if (state := place.state) is not None}
    stopped = [rank for rank, state in states.items() if state == psutil.STATUS_STOPPED]
    for rank in states:
        _send(places[rank], SIGNAL)
    for rank in stopped:  # a signal reaches it once it goes on
        _send(places[rank], signal.SIGCONT)
    texts = _written({rank: places[rank].file for rank in states})
    for rank in stopped:
        _send(places[rank], signal.SIGSTOP)
    gone = {rank: f"process {place.pid} is gone\n" for rank, place in places.items() if rank not in states}
    there = {
        rank: f"process {places[rank].pid}, {state}\n{texts[rank] or _NOTHING}"
        for rank, state in states.items()
    }
    return {**gone, **there}


def kill_each(places: Mapping[int, Place]) -> list[int]:
    """Ends them at once, whatever they are at; the ranks of those that are still there after a while."""
    for place in places.values():
        if place.state is not None:
            _send(place, signal.SIGKILL)
    end = time.monotonic() + WAIT_S
    while (
        left := [rank for rank, place in places.items() if place.state is not None]
    ) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _send(place: Place, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(place.pid, number)


_NOTHING = f"it did not write its stacks within {WAIT_S:.0f}s\n"


def _written(files: Mapping[int, str]) -> dict[int, str]:
    """What is written to each, once nothing is added any more."""
    texts, end = dict.fromkeys(files, ""), time.monotonic() + WAIT_S
    while time.monotonic() < end:
        time.sleep(0.1)
        now = {rank: _read(file) for rank, file in files.items()}
        if all(now.values()) and now == texts:
            break
        texts = now
    return texts


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
