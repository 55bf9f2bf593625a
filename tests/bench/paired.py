"""Sides that take turns: each in a process of its own, one pass after the other, so that whatever else the machine does
hits all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


class Broken(Exception):
    """A side can't run here."""


@dataclass
class Passes:
    """What a side did.

    Attributes:
        seconds: of each pass but the first, which warms up.
        losses: before each update.
        peak_mib: the most memory that it held in a pass, over what it held before it loaded the model.
        told: what else the side said of its last pass.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


class Side:
    """A process that makes passes."""

    def __init__(
        self,
        module: str,
        case: Path,
        log: Path,
        threads: int,
        python: str = sys.executable,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts it.

        Args:
            module: to run.
            case: what it is told.
            log: takes what it prints.
            threads: that it computes with.
            python: the interpreter, where the side lives in another environment.
            environment: variables that it begins with.
        """
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, "-m", module, str(case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), **environment},
            )

    def one(self) -> dict[str, Any]:
        """Makes a pass.

        Raises:
            Broken: the process ended instead.
        """
        self._read()
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()][-1:]
            raise Broken(" ".join(last) or "ended without a word")
        return dict(json.loads(line))


def alternate(sides: Mapping[str, Side], times: int) -> tuple[dict[str, Passes], dict[str, str]]:
    """Lets all sides make a pass to warm up, then `times` passes each in turn.

    Returns:
        What they did, and why some of them can't.
    """
    done, broken = {name: Passes() for name in sides}, {}
    for turn in range(times + 1):
        for name, side in sides.items():
            if name in broken:
                continue
            try:
                told = side.one()
            except Broken as error:
                broken[name] = str(error)
                continue
            passes = done[name]
            passes.losses.append(told.pop("loss"))
            passes.peak_mib = max(passes.peak_mib, told.pop("peak_mib"))
            seconds = told.pop("seconds")
            passes.told = told
            if turn > 0:
                passes.seconds.append(seconds)
    for side in sides.values():
        side.stop()
    return {name: passes for name, passes in done.items() if name not in broken}, broken


def ratio(ours: Passes, other: Passes) -> float:
    """How many times as fast we are: the median over pairs of passes made right after each other."""
    pairs: Sequence[float] = [b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]
    return statistics.median(pairs)
