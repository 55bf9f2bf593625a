"""What a person sees: lines, tables, and progress that reads well in a terminal and in a job's log alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(highlight=False, soft_wrap=True, stderr=True)


def say(text: str, style: str | None = None) -> None:
    """One line, or a few."""
    out.print(text, style=style, markup=False)


def warn(text: str) -> None:
    """A line that should not be missed."""
    err.print(f"warning: {text}", style="yellow", markup=False)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    styles: Sequence[str | None] | None = None,
) -> None:
    """A small table, with a title or an empty one, numbers to the right; `styles` colours its rows."""
    drawn = Table(title=title or None, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left")
    for row, style in zip(rows, styles or [None] * len(rows), strict=True):
        drawn.add_row(*(str(cell) for cell in row), style=style)
    out.print(drawn, markup=False)


def _is_number(cell: object) -> bool:
    return str(cell)[:1].isdigit() or str(cell)[:1] in "-–<≥"


def human_count(number: float) -> str:
    """1234567 as 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{number / scale:.3g}{unit}"
    return f"{number:,.0f}"


def human_bytes(size: float) -> str:
    """1234567 as 1.2 MiB."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB") if size >= _BYTES_IN[unit] / 10), "KiB")
    return f"{size / _BYTES_IN[unit]:,.3g} {unit}"


_BYTES_IN = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def human_time(seconds: float) -> str:
    """Seconds as 45s, 3m05s or 2h07m."""
    whole = max(0, int(seconds + 0.5))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class ProgressLine:
    """Progress with what is going on and the time left: a bar in a terminal, now and then a line in a log."""

    LOG_EVERY_S = 10.0

    def __init__(self, label: str, total: float) -> None:
        """`total` is in the unit that `update` is given; 0 if nobody knows."""
        self._label, self._total = label, total
        self._started = self._logged = time.monotonic()
        self._first: float | None = None
        self._bar: Progress | None = None
        if out.is_terminal:
            columns = (TextColumn(label), BarColumn(30), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[detail]}"), console=out, transient=True)
            self._task = self._bar.add_task(label, total=total or None, detail="")

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float, detail: str) -> None:
        """`done` of the total; `detail` says the rate and whatever else is worth reading."""
        if self._bar:
            self._bar.update(self._task, completed=done, detail=detail)
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        if now - self._logged >= self.LOG_EVERY_S:
            self._logged = now
            say(f"{self._label} {self._share(done)}{detail}{self._left(done, now)}")

    def _share(self, done: float) -> str:
        return f"{100 * done / self._total:3.0f}%  " if self._total else ""

    def _left(self, done: float, now: float) -> str:
        """The time left at the rate since the first update: what came before it (a resume) took no time."""
        progressed = done - (self._first or 0)
        if not self._total or progressed <= 0 or done >= self._total:
            return ""
        return f"  {human_time((now - self._started) * (self._total - done) / progressed)} left"
