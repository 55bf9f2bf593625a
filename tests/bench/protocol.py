"""How a bench and the process of one side talk: the side says when it is ready, and makes a pass whenever it is told.

Lines of JSON on stdin and stdout. Only the standard library: a side may live in another environment than the bench.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

_out: TextIO = sys.stdout


def own_stdout() -> None:
    """Keeps stdout for what the bench reads; whatever libraries print goes to stderr."""
    global _out
    _out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


class Passes:
    """The passes over all documents that a side makes.

    Memory is told over what the process held when this was made, which is best before a model is loaded.
    """

    def __init__(self) -> None:
        """The libraries should be imported by now."""
        self._before = _memory("VmRSS")
        self._started = 0.0

    def begin(self) -> None:
        """Waits until the bench wants a pass; ends the process when it wants no more."""
        self._say({"ready": True})
        if sys.stdin.readline().strip() != "go":
            _out.flush()
            os._exit(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._started = time.perf_counter()

    def end(self, loss: float, **more: Any) -> None:
        """A pass is over: one optimizer step on all documents, with this mean loss before it."""
        seconds = time.perf_counter() - self._started
        self._say({"seconds": seconds, "loss": loss, "peak_mib": _memory("VmHWM") - self._before, **more})

    @staticmethod
    def _say(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=_out, flush=True)


def _memory(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
