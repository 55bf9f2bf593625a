"""When a launch came how far, from its command to the end of its first step."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

import psutil

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""The variable of a process's environment that names what it runs first, as `worker_process_setup_hook` sets it."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For imports: no search for garbage, which takes a quarter of their time and finds none.

    What there is in the end is left out of later searches, too.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if is_on:
            gc.enable()


def process_began() -> float:
    """When this process was started, on the clock of time.monotonic."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


class Startup:
    """Seconds since the beginning at which things were done, each for the first time."""

    def __init__(self, began: float) -> None:
        """`began`: on the clock of time.monotonic."""
        self._began = began
        self.marks: dict[str, float] = {}

    def seconds(self, at: float | None = None) -> float:
        """From the beginning to `at`, or to now."""
        return round((time.monotonic() if at is None else at) - self._began, 2)

    def mark(self, name: str, at: float | None = None) -> None:
        """`name` is done: at `at`, or now. Only the first time counts: a restart begins nothing."""
        self.marks.setdefault(name, self.seconds(at))
