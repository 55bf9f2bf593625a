"""One driver a run: who has it says so in a file beside it, on any filesystem, and says it again while it lives.

Files can't be locked on an object store, and on a network file system only if it is set up for it. So a driver writes
who it is and counts; another one that finds the file looks whether that process is there, or, from another machine,
whether it still counts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from raytune_ds import storage
from raytune_ds.console import say, warn
from raytune_ds.errors import UserError

BEAT_S = 5.0
# A driver that has not counted for so long is dead: it may have been busy, and storage slow.
SILENCE_S = 6 * BEAT_S
# Two that begin at the same moment both write; who wrote last has it.
SETTLE_S = 0.1
REMOTE_SETTLE_S = 2.0
# Between two looks at whether another driver is done.
POLL_S = 0.5


@dataclass(frozen=True)
class Holder:
    """A driver.

    Attributes:
        id: of no other driver.
        host: of its machine, for people.
        processes: tells the machine, as long as it runs, and the namespace that its process number is of.
        pid: of its process.
        started: when that process did, in seconds since the epoch.
        since: when it began, for people.
        count: of its signs of life.
    """

    id: str
    host: str
    processes: str
    pid: int
    started: float
    since: str
    count: int = 0

    @staticmethod
    def here() -> Holder:
        """The process that asks."""
        started = psutil.Process().create_time()
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        return Holder(uuid.uuid4().hex, platform.node(), _processes(), os.getpid(), started, now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _processes() -> str:
    """Containers share a boot, and may share a host name; their process numbers are their own."""
    parts = []
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = Path(name)
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return " ".join(parts) or platform.node()


@contextlib.contextmanager
def held(path: str, what: str, patient: bool = False) -> Iterator[None]:
    """Keeps other drivers away from what belongs to the file at `path`.

    Args:
        path: of the file.
        what: how messages call what is held.
        patient: whether to wait for another driver that has it.

    Raises:
        UserError: another driver has it, and lives.
    """
    me = Holder.here()
    while (other := _take(path, me)) is not None:
        if not patient:
            raise UserError(f"{what}: another driver is at it: {other}. Wait for it to end, or stop it.")
        _wait_for(path, what, other)
    end = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, what, me, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _read(path, me.id) == me.id:
                storage.delete_file(path)


def _take(path: str, me: Holder) -> Holder | None:
    """Who has it instead."""
    other = _holder(path)
    if other is not None and _lives(path, other, say):
        return other
    storage.write_json(path, asdict(me))
    time.sleep(SETTLE_S if storage.is_local(path) else REMOTE_SETTLE_S)
    other = _holder(path)
    return other if other is not None and other.id != me.id else None


def _wait_for(path: str, what: str, other: Holder) -> None:
    """Until another driver is done, or dead."""
    say(f"{what}: another driver is at it ({other}); waiting for it")
    while (now := _holder(path)) is not None and now.id == other.id and _lives(path, now):
        time.sleep(POLL_S)


def _lives(path: str, other: Holder, tell: Callable[[str], None] = lambda text: None) -> bool:
    if other.processes == _processes():
        try:
            return abs(psutil.Process(other.pid).create_time() - other.started) < 1.0
        except psutil.Error:
            return False
    tell(f"looking for {SILENCE_S:.0f}s whether its other driver lives ({other})")
    end = time.monotonic() + SILENCE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT_S))
        now = _holder(path)
        if now is None:
            return False
        if (now.id, now.count) != (other.id, other.count):
            return True
    return False


def _beat(path: str, what: str, me: Holder, end: threading.Event) -> None:
    while not end.wait(BEAT_S):
        try:
            if _read(path, me.id) != me.id:
                warn(
                    f"{what}: another driver took it over, for this one had not been heard of; this one stops"
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return
            me = replace(me, count=me.count + 1)
            storage.write_json(path, asdict(me))
        except OSError:
            continue  # storage that is away or full for a while is no reason to stop


def _read(path: str, default: str) -> str:
    """Who has it; `default` if nobody says so."""
    holder = _holder(path)
    return default if holder is None else holder.id


def _holder(path: str) -> Holder | None:
    try:
        values: Any = storage.read_json(path)
        return None if values is None else Holder(**values)
    except (ValueError, TypeError):
        return None  # a file of which a crash of the machine left half is nobody's
