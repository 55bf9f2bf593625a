"""The preparation of data beside TRL's, on the same rows with the same tokenizer: rows a second, memory, full packs.

Each side lives in a process of its own; what it imports, and the start of Ray, are in no time. The first preparation
of each, in which workers start and import, is told apart. From then on the two alternate, so that whatever else the
machine does hits both. What counts is the ratio.

    python -m tests.bench.data [FOLDER [PART ...]]      # PART: speed, memory, fullness

FOLDER, or RAYTUNE_BENCH_DATA, holds alpaca_en_demo.json and glaive_toolcall_en_demo.json; without it the rows are the
demo's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from raytune_ds.console import say, table
from raytune_ds.model import tiny
from tests.bench.datarows import Rows, rows_of
from tests.bench.sides import CPUS, Packs, Side, Work, serve_ours, serve_peer

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
ALTERNATIONS = 3
ROWS = {"alpaca": 30_000, "glaive": 15_000, "demo": 50_000}
MEMORY_ROWS = {"alpaca": 10_000, "glaive": 2_000, "demo": 20_000}
SEQ_LEN = 2048
SEQ_LENS = (2048, 8192)
TIMES_LARGER = 10


class Bench:
    """The sides, and the files they work on."""

    def __init__(self, folder: Path, model: Path, sides: list[Side]) -> None:
        """Everything is written below `folder`."""
        self.sides, self._folder, self._model = sides, folder, model
        self._numbers = count()

    def data(self, rows: Rows, number: int) -> Path:
        """A file of so many rows."""
        path = self._folder / f"{rows.name}-{number}.jsonl"
        return path if path.exists() else rows.write(path, number)

    @contextmanager
    def work(self, data: Path, seq_len: int = SEQ_LEN) -> Iterator[Work]:
        """Something to prepare anew, the result of which is thrown away in the end."""
        folder = self._folder / f"made-{next(self._numbers)}"
        folder.mkdir()
        yield Work(data, self._model, seq_len, folder)
        shutil.rmtree(folder)

    def prepared(self, side: Side, data: Path, seq_len: int = SEQ_LEN) -> Packs:
        """What a side makes of it."""
        with self.work(data, seq_len) as work:
            return side.prepare(work)


def speed(bench: Bench, rows: Rows) -> None:
    """Rows a second, alternating."""
    number = ROWS[rows.name]
    data = bench.data(rows, number)
    first = {side.name: bench.prepared(side, data) for side in bench.sides}
    seconds: dict[str, list[float]] = {side.name: [] for side in bench.sides}
    for _ in range(ALTERNATIONS):
        for side in bench.sides:
            seconds[side.name].append(bench.prepared(side, data).seconds)
    lines = []
    for name, packs in first.items():
        ratios = [o / s for s, o in zip(seconds[name], seconds[bench.sides[-1].name], strict=True)]
        cells = (
            f"{number / statistics.median(seconds[name]):,.0f}",
            f"{min(seconds[name]):.1f} to {max(seconds[name]):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{packs.seconds:.1f}",
            f"{packs.num_supervised:,}",
            f"{packs.full:.1%}",
        )
        lines.append([name, *cells])
    table(
        f"{number:,} rows of {rows.name}, packs of {SEQ_LEN:,}, {CPUS} processes, {ALTERNATIONS} alternations",
        ["", "rows/s", "seconds", "ratio", "first", "supervised", "full"],
        lines,
    )


def memory(bench: Bench, rows: Rows) -> None:
    """What all processes of a side hold at most, with few rows and with many."""
    lines = []
    for side in bench.sides:
        for number in (MEMORY_ROWS[rows.name], TIMES_LARGER * MEMORY_ROWS[rows.name]):
            with bench.work(bench.data(rows, number)) as work:
                packs, before, peak = side.prepare_watched(work)
            cells = (f"{number:,}", f"{before:,.0f}", f"{peak:,.0f}", f"{packs.seconds:.1f}")
            lines.append([side.name, *cells])
    table(
        f"memory of all processes, rows of {rows.name}, MiB without pages of files",
        ["", "rows", "before", "peak", "seconds"],
        lines,
    )


def fullness(bench: Bench, rows: Rows) -> None:
    """The share of real tokens in the packs, of the rows as they are and of many, where the last pack decides less."""
    lines = []
    for number in (len(rows.originals), ROWS[rows.name]):
        data = bench.data(rows, number)
        for seq_len in SEQ_LENS:
            for side in bench.sides:
                packs = bench.prepared(side, data, seq_len)
                cells = (f"{number:,}", f"{seq_len:,}", f"{len(packs.used):,}", f"{packs.full:.2%}")
                lines.append([side.name, *cells, f"{packs.full_without_last:.2%}"])
    table(
        f"packs of {rows.name}",
        ["", "rows", "seq_len", "packs", "full", "without the last"],
        lines,
    )


def main(folder: Path | None, parts: list[str]) -> None:
    """Prints the tables."""
    os.environ |= QUIET
    sides = {"raytune_ds": serve_ours}
    if importlib.util.find_spec("trl") is None:
        say("trl is not installed (pip install trl), so there is nothing to compare with")
    else:
        sides["TRL"] = serve_peer
    with tempfile.TemporaryDirectory(prefix="raytune-bench-") as scratch:
        os.environ["HF_HOME"] = f"{scratch}/hf"
        kinds = rows_of(folder)
        texts = [text for rows in kinds for text in rows.texts()]
        model = tiny.build("qwen2", lambda: texts, 0, Path(scratch) / "model")
        bench = Bench(Path(scratch), model, [Side(name, serve) for name, serve in sides.items()])
        for rows in kinds:
            for part in (speed, memory, fullness):
                if not parts or part.__name__ in parts:
                    part(bench, rows)
        for side in bench.sides:
            side.stop()


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("RAYTUNE_BENCH_DATA")
    main(Path(given) if given else None, sys.argv[2:])
