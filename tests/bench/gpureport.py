"""What the GPU bench found, as Markdown and JSON, written anew after each row, so that a cut loses none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raytune_ds.console import say
from raytune_ds.errors import first_line

Row = Mapping[str, Any]


class Deadline:
    """The time that a run may take."""

    def __init__(self, seconds: float) -> None:
        """From now on."""
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


class Report:
    """Tables of rows under headings."""

    def __init__(self, folder: Path, about: dict[str, Any], deadline: Deadline) -> None:
        """Writes results.md and results.json to `folder`; `about` says where and with what it was measured."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._about, self._deadline = folder, about, deadline
        self._tables: dict[str, list[Row]] = {}
        self._started = time.monotonic()
        self._write()

    def add(self, heading: str, row: Row) -> None:
        """A row more."""
        self._tables.setdefault(heading, []).append(row)
        told = ", ".join(f"{key} {_text(value)}" for key, value in row.items())
        say(f"[{time.monotonic() - self._started:4.0f} s] {heading}: {told}")
        self._write()

    def attempt(self, heading: str, name: str, needed_s: float, work: Callable[[], None]) -> None:
        """Does what adds rows of its own. What fails, or would not be done in time, is a row, too."""
        if self._deadline.left < needed_s:
            left = f"{self._deadline.left:.0f} s left, {needed_s:.0f} s wanted"
            self.add(heading, {"": name, "note": f"not run: {left}"})
            return
        try:
            work()
        except Exception as error:
            self.add(heading, {"": name, "note": f"failed: {type(error).__name__}: {first_line(error)}"})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _write(self) -> None:
        found = {"about": self._about, "tables": self._tables}
        (self._folder / "results.json").write_text(json.dumps(found, indent=1, default=str))
        lines = ["# GPU bench", "", *(f"- {key}: {value}" for key, value in self._about.items())]
        for heading, rows in self._tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {heading}", "", _line(columns), _line(["---"] * len(columns))]
            lines += [_line([_text(row.get(column, "")) for column in columns]) for row in rows]
        (self._folder / "results.md").write_text("\n".join(lines) + "\n")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
