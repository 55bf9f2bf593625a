"""The training step beside other trainers, on the same documents with the same model, adapter, optimizer and precision.

Each side lives in a process of its own and makes a pass whenever it is its turn: one optimizer step on all documents,
so that the losses of all sides are those of the same gradients, and stay equal from pass to pass. What counts is the
ratio of real (unpadded) tokens a second, of passes made right after each other.

    make bench
    python -m tests.bench [NAME ...] [--data FOLDER] [--out FOLDER] [--times 5] [--list]

FOLDER of --data holds alpaca_en_demo.json and glaive_toolcall_en_demo.json; without it documents are drawn with the
lengths of those. TRL_PYTHON and LLAMAFACTORY_PYTHON name interpreters of environments that have these packages, where
they are not installed beside ours. The tables, and all that was measured, are left in the FOLDER of --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from raytune_ds.console import say, table
from tests.bench import corpus, shapes
from tests.bench.cases import COMPARISONS, MATMULS, OURS, Comparison
from tests.bench.paired import Passes, Side, alternate, ratio
from tests.bench.peers.case import Case

THREADS = 2
HEAD = ["", "tokens/s", "we are x times as fast", "peak MiB", "ours to theirs", "losses, first and last"]


def compare(wanted: Comparison, folder: Path, data: Path | None, times: int) -> dict[str, Any]:
    """Runs the sides of a comparison in turn; all that was measured."""
    vocabulary = shapes.SHAPES[wanted.shape]["vocab_size"]
    documents = corpus.of(wanted.data, wanted.documents, vocabulary, data, wanted.longest)
    common = Case(
        model=str(shapes.make(wanted.shape, folder)),
        documents=str(documents.write(folder / f"{wanted.name}.jsonl")),
        lora=wanted.lora,
        dtype=wanted.dtype,
        threads=THREADS,
        seq_len=corpus.SEQ_LEN[wanted.data],
    )
    sides, absent = {}, {}
    for number, peer in enumerate(wanted.peers):
        if peer.python is None:
            absent[peer.name] = "not installed"
            continue
        case = Case(**{**asdict(common), "options": peer.options}).write(folder / f"{number}.json")
        module = f"tests.bench.peers.{peer.module}"
        log = folder / f"{number}.log"
        sides[peer.name] = Side(module, case, log, THREADS, peer.python, peer.environment)
    done, broken = alternate(sides, times)
    return {
        "name": wanted.name,
        "documents": documents.name,
        "tokens": documents.tokens,
        "supervised": documents.supervised,
        "sides": done,
        "absent": absent | broken,
    }


def rows_of(measured: dict[str, Any]) -> list[list[str]]:
    """The cells of a comparison's table."""
    sides: dict[str, Passes] = measured["sides"]
    ours, rows = sides[OURS.name], []
    for name, passes in sides.items():
        if name == MATMULS.name:
            continue
        rows.append(
            [
                name,
                f"{measured['tokens'] / passes.median:,.0f}",
                "" if passes is ours else f"{ratio(ours, passes):.2f}",
                f"{passes.peak_mib:,.0f}",
                "" if passes is ours else f"{ours.peak_mib / passes.peak_mib:.2f}",
                f"{passes.losses[0]:.4f} {passes.losses[-1]:.4f}",
            ]
        )
    return rows


def share_of_limit(measured: dict[str, Any]) -> str | None:
    """Needed operations over what the matrix products alone, made in turn with our passes, say could be done."""
    sides: dict[str, Passes] = measured["sides"]
    if MATMULS.name not in sides:
        return None
    ours, limit = sides[OURS.name], sides[MATMULS.name]
    rate = limit.told["flops"] / limit.median
    needed = ours.told["flops"]
    share = ratio(ours, limit) * needed / limit.told["flops"]
    return (
        f"{needed / ours.median / 1e9:,.0f} of the {rate / 1e9:,.0f} GFLOP/s that the matrix products alone reach at "
        f"these shapes: {share:.0%}"
    )


def markdown(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table as README has them."""
    lines = [f"### {title}", "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *notes, ""])


def machine() -> str:
    """Where it ran, and with what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{packages}, Python {platform.python_version()}, {platform.machine()}, {THREADS} threads"


def main() -> None:
    """Prints the tables, each when it is there."""
    names = [c.name for c in COMPARISONS]
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of what to compare; all by default")
    parser.add_argument("--data", type=Path, help="folder of real rows")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where the results go")
    parser.add_argument("--times", type=int, default=5, help="passes of each side that count")
    parser.add_argument("--list", action="store_true", help="the names")
    told = parser.parse_args()
    if unknown := set(told.names) - set(names):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(names)}")
    if told.list:
        say("\n".join(names))
        return
    told.out.mkdir(parents=True, exist_ok=True)
    texts, results = [machine(), ""], []
    say(machine())
    with tempfile.TemporaryDirectory(prefix="raytune-bench-") as scratch:
        for wanted in COMPARISONS:
            if told.names and wanted.name not in told.names:
                continue
            measured = compare(wanted, Path(scratch), told.data, told.times)
            title = f"{wanted.name}: {measured['documents']}, {measured['tokens']:,} tokens"
            rows, notes = rows_of(measured), []
            if share := share_of_limit(measured):
                notes.append(share)
            notes += [f"{name}: {why}" for name, why in measured["absent"].items()]
            table(title, HEAD, rows)
            for note in notes:
                say(note)
            texts.append(markdown(title, rows, notes))
            sides = {name: asdict(passes) for name, passes in measured["sides"].items()}
            results.append({**measured, "sides": sides})
            (told.out / "bench.md").write_text("\n".join(texts), encoding="utf-8")
            stamp = {"machine": machine(), "torch": torch.__config__.show(), "results": results}
            (told.out / "bench.json").write_text(json.dumps(stamp, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
