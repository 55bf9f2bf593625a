"""`make parity`: the whole table, printed and asserted."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raytune_ds.model import tiny
from tests.conftest import TEXTS
from tests.matrix.cases import (
    ENGINES,
    KINDS,
    LOSS_LIMIT,
    MODELS,
    WEIGHT_LIMIT,
    WORLDS,
    Case,
    Trace,
    reference,
)
from tests.matrix.run import halves, run

# Lora checkpoints hold far less and are written and read by the same code: a sample of the pairs is enough.
LORA_PAIRS = (
    ("ddp", "zero3"),
    ("zero3", "fsdp"),
    ("fsdp", "zero2"),
    ("zero1", "ddp"),
    ("zero2+offload", "zero3+offload"),
)
out = Console(width=140)


def main() -> int:
    """Prints both tables; the exit code says whether all is within the limits."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = {name: tiny.build(name, lambda: TEXTS, 0, root / name) for name in MODELS}
        plain = {(model, kind): reference(models[model], kind) for model in MODELS for kind in KINDS}
        failed = _parity(models, plain) + _portability(models, plain, root)
    out.print(
        f"{time.monotonic() - started:.0f} s; {len(failed)} beyond the limits"
        + "".join(f"\n  {f}" for f in failed)
    )
    return bool(failed)


def _parity(models: dict[str, Path], plain: dict[tuple[str, str], Trace]) -> list[str]:
    """Losses of 10 steps and final weights of every engine beside one plain process."""
    columns = [(kind, world, model) for model in MODELS for kind in KINDS for world in WORLDS]
    cases = [Case(engine, *column) for engine in ENGINES for column in columns]
    traces = dict(zip(cases, run(cases, models), strict=True))
    _print(
        "largest relative difference of a loss in 10 steps / largest difference of a final weight",
        "workers",
        [f"{model} {kind} x{world}" for kind, world, model in columns],
        list(ENGINES),
        lambda row, column: traces[Case(list(ENGINES)[column], *columns[row])],
        lambda row: plain[columns[row][2], columns[row][0]],
    )
    return [c.label for c, t in traces.items() if not _within(t, plain[c.model, c.kind])]


def _portability(models: dict[str, Path], plain: dict[tuple[str, str], Trace], root: Path) -> list[str]:
    """Steps 6 to 10 from every engine's checkpoint at 2 workers, in every engine at 3."""
    pairs = [(a, b, "full") for a in ENGINES for b in ENGINES] + [(a, b, "lora") for a, b in LORA_PAIRS]
    cases = [(Case(a, kind, 2, "deepseek-v3"), Case(b, kind, 3, "deepseek-v3")) for a, b, kind in pairs]
    first, then = halves(cases, root / "checkpoints")
    traces = dict(zip(pairs, run([*first, *then], models)[len(first) :], strict=True))
    _print(
        "the same for steps 6 to 10, begun from another engine's checkpoint: saved by 2 workers, continued by 3 (full)",
        "saved by",
        list(ENGINES),
        list(ENGINES),
        lambda row, column: traces[list(ENGINES)[row], list(ENGINES)[column], "full"],
        lambda _: plain["deepseek-v3", "full"],
    )
    for a, b in LORA_PAIRS:
        trace, expected = traces[a, b, "lora"], plain["deepseek-v3", "lora"]
        out.print(f"lora, {a} to {b}: {_cell(trace, expected)}")
    return [f"{a} to {b}, {k}" for (a, b, k), t in traces.items() if not _within(t, plain["deepseek-v3", k])]


def _within(trace: Trace, plain: Trace) -> bool:
    return trace.loss_error(plain) <= LOSS_LIMIT and trace.weight_error(plain) <= WEIGHT_LIMIT


def _cell(trace: Trace, plain: Trace) -> str:
    return f"{trace.loss_error(plain):.0e} / {trace.weight_error(plain):.0e}"


def _print(
    title: str,
    corner: str,
    rows: Sequence[str],
    columns: Sequence[str],
    trace: Callable[[int, int], Trace],
    plain: Callable[[int], Trace],
) -> None:
    table = Table(title=f"{title} (limits {LOSS_LIMIT:.0e} / {WEIGHT_LIMIT:.0e})", title_justify="left")
    for name in (corner, *columns):
        table.add_column(name)
    for r, name in enumerate(rows):
        table.add_row(name, *(_cell(trace(r, c), plain(r)) for c in range(len(columns))))
    out.print(table)


if __name__ == "__main__":
    sys.exit(main())
