"""What more tokens cost: our passes over 1, 4 and 16 times as many documents, in turn.

python -m tests.bench.growth [TIMES]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from raytune_ds.console import say, table
from tests.bench import corpus, shapes
from tests.bench.cases import OURS
from tests.bench.paired import Side, alternate
from tests.bench.peers.case import TARGETS, Case

SHAPE, DOCUMENTS, TIMES_LARGER, THREADS = "qwen2", 24, (1, 4, 16), 2


def main(times: int) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory(prefix="raytune-bench-") as scratch:
        folder, sides, tokens = Path(scratch), dict[str, Side](), dict[str, int]()
        one = corpus.of("alpaca", DOCUMENTS, shapes.SHAPES[SHAPE]["vocab_size"], None)
        for factor in TIMES_LARGER:
            name, documents = f"{factor}x", replace(one, documents=one.documents * factor)
            rows = documents.write(folder / f"{name}.jsonl")
            case = Case(
                model=str(shapes.make(SHAPE, folder)),
                documents=str(rows),
                lora=TARGETS,
                seq_len=corpus.SEQ_LEN["alpaca"],
            )
            module = f"tests.bench.peers.{OURS.module}"
            told, log = case.write(folder / f"{name}.json"), folder / f"{name}.log"
            sides[name] = Side(module, told, log, THREADS, environment=OURS.environment)
            tokens[name] = documents.tokens
        done, broken = alternate(sides, times)
    rates = {name: tokens[name] / passes.median for name, passes in done.items()}
    lines = [
        [
            name,
            f"{tokens[name]:,}",
            f"{rate:,.0f}",
            f"{rate / rates['1x']:.3f}",
            f"{done[name].peak_mib:,.0f}",
        ]
        for name, rate in rates.items()
    ]
    table(
        f"LoRA, {SHAPE}, {times} alternations",
        ["documents", "tokens", "tokens/s", "to 1x", "peak MiB"],
        lines,
    )
    for name, why in broken.items():
        say(f"{name}: {why}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
