"""The demo: a tiny DeepSeek-V3-shaped model learns what prescriptions say.

1. A base model is trained from scratch, all parameters, on general glossary questions: it learns how such questions are
   worded, and knows nothing of the domain.
2. LoRA teaches it sixty prescription abbreviations, in ten phrasings each.
3. The same with all parameters, for comparison.

What counts is the exact match on three further phrasings of each fact, which neither was trained on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from raytune_ds import storage
from raytune_ds.compose import compose
from raytune_ds.console import human_count, human_time, say, table
from raytune_ds.demo.data import domain_rows, general_rows, held_out_rows, write_rows
from raytune_ds.evaluate import Score, exact_match
from raytune_ds.generate import Generator
from raytune_ds.launch import Result, launch

COMMON = [
    f"scaling.num_workers={min(2, os.cpu_count() or 1)}",
    "scaling.use_gpu=false",  # so that everybody sees the same figures, and one GPU is no obstacle
    "data.seq_len=512",
    "train.micro_batch=2",
    "tracking.to=[]",
]
BASE = [
    "model.name=tiny:deepseek-v3",
    "adapter.kind=none",
    "data.eval.fraction=0",
    "train.global_batch=4",
    "train.learning_rate=2e-3",
    "train.num_train_epochs=12",
    "train.weight_decay=0.01",
]
LORA = [
    # A large rank and rate for LoRA, because the model is small and the facts are all new to it.
    "adapter.r=64",
    "adapter.alpha=128",
    "train.global_batch=4",
    "train.learning_rate=3e-3",
    "train.warmup_ratio=0.1",
    "train.num_train_epochs=60",
    "train.eval_steps=60",
]
FULL = [
    "adapter.kind=none",
    "train.global_batch=4",
    "train.learning_rate=1e-3",
    "train.num_train_epochs=15",
    "train.eval_steps=30",
]


def demo(storage_root: str, debug: bool = False) -> dict[str, Score]:
    """Runs the demo; a second time, finished parts are reused.

    Args:
        storage_root: everything goes to `demo/` below it.
        debug: show what the libraries say.

    Returns:
        The exact match of base, lora and full on the held-out phrasings.
    """
    root = Path(storage.absolute(storage_root)) / "demo"
    general, domain, held_out = (
        root / "data" / f"{name}.jsonl" for name in ("general", "domain", "held-out")
    )
    for rows, path in ((general_rows(), general), (domain_rows(), domain), (held_out_rows(), held_out)):
        write_rows(rows, path)

    def run(name: str, title: str, settings: list[str]) -> Result:
        say(f"\n{title}", style="bold")
        return launch(compose([], [f"run.storage={root}", f"run.name={name}", *COMMON, *settings]), debug)

    base = run(
        "base", "1. The base model, from scratch, on general questions", [f"data.sources={general}", *BASE]
    )
    domain_data = [f"model.name={base.run}/final", f"data.sources={domain}", f"data.eval.sources={held_out}"]
    lora = run("lora", "2. LoRA on the domain", [*domain_data, *LORA])
    full = run("full", "3. All parameters on the domain, to compare", [*domain_data, *FULL])

    say("\nasking all three models what was never asked in training ...")
    pairs = [(row["instruction"], row["output"]) for row in held_out_rows()]
    results = {"base": base, "lora": lora, "full": full}
    scores = {name: exact_match(Generator.of_run(result.run), pairs) for name, result in results.items()}
    _show(results, scores)
    return scores


def _show(results: dict[str, Result], scores: dict[str, Score]) -> None:
    before = results["lora"].progress["first_eval_loss"]
    table(
        f"{scores['base'].num_questions} questions in phrasings never trained on",
        ["", "exact match", "loss", "trained", "time", "memory", "saved"],
        [
            ["before", _percent(scores["base"]), f"{before:.3f}", "-", "-", "-", "-"],
            ["LoRA", *_row(results["lora"], scores["lora"])],
            ["full", *_row(results["full"], scores["full"])],
        ],
    )
    say(
        "trained: parameters; time: in training steps; memory: at the peak, a worker; saved: in final/",
        style="dim",
    )
    say(
        f"\nThe model learned what prescriptions say. Ask it: What does b.i.d. mean?\n{_chat(results['lora'])}"
    )


def _chat(result: Result) -> str:
    return f"  {Path(sys.executable).parent / 'raytune-ds'} chat --run {result.run}"


def _row(result: Result, score: Score) -> list[Any]:
    return [
        _percent(score),
        f"{result.progress['last_eval_loss']:.3f}",
        human_count(result.trainable_parameters),
        human_time(result.progress["seconds"]),
        f"{max(result.peak_memory_mib):,.0f} MiB",
        f"{result.final_bytes / (1 << 20):.1f} MiB",
    ]


def _percent(score: Score) -> str:
    return f"{100 * score.exact_match:.1f}%"
