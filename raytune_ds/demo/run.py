"""The demo: a tiny DeepSeek-V3-shaped model learns what prescriptions say.

1. A base model is trained from scratch, all parameters, on general glossary questions: it learns how such questions are
   worded, and knows nothing of the domain.
2. LoRA teaches it sixty prescription abbreviations, in ten phrasings each.
3. The same with all parameters, for comparison.

What counts is the exact match on three further phrasings of each fact, which neither was trained on, and on the general
questions, which neither should have forgotten.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from raytune_ds import storage
from raytune_ds.compose import compose
from raytune_ds.console import human_count, human_time, say, table
from raytune_ds.demo.data import domain_rows, general_rows, held_out_rows, recall_rows, write_rows
from raytune_ds.evaluate import Report, Wish, measure
from raytune_ds.evaluation.intervals import Estimate
from raytune_ds.evaluation.results import Measured
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


HELD_OUT, RECALL = "held-out.jsonl", "recall.jsonl"


def demo(storage_root: str, debug: bool = False) -> dict[str, Report]:
    """Runs the demo; a second time, finished parts are reused.

    Args:
        storage_root: everything goes to `demo/` below it.
        debug: show what the libraries say.

    Returns:
        What was measured of lora and full, and of the base beside each of them.
    """
    root = Path(storage.absolute(storage_root)) / "demo"
    general, domain, held_out, recall = (
        root / "data" / name for name in ("general.jsonl", "domain.jsonl", HELD_OUT, RECALL)
    )
    for rows, path in (
        (general_rows(), general),
        (domain_rows(), domain),
        (held_out_rows(), held_out),
        (recall_rows(), recall),
    ):
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

    say("\nasking all three models what was never asked in training, and the general questions again ...")
    # In this process: another one would take longer to start than the questions take.
    wish = Wish(data=(str(held_out),), general=(str(recall),), batch_size=64, num_workers=0)
    results = {"lora": lora, "full": full}
    reports = {name: measure(result.run, wish, debug) for name, result in results.items()}
    _show(results, reports)
    return reports


def _show(results: dict[str, Result], reports: dict[str, Report]) -> None:
    asked, recalled = (reports["lora"].of(name) for name in (HELD_OUT, RECALL))
    before = [_percent(one.metric("exact_match").base) for one in (asked, recalled)]
    loss = results["lora"].progress["first_eval_loss"]
    asked_of = (len(list(rows)) for rows in (held_out_rows(), recall_rows()))
    table(
        "{} questions in phrasings never trained on, {} general ones".format(*asked_of),
        ["", "exact match", "loss", "general", "trained", "time", "memory", "saved"],
        [
            ["before", before[0], f"{loss:.3f}", before[1], "-", "-", "-", "-"],
            *(_row(name, results[key], reports[key]) for name, key in (("LoRA", "lora"), ("full", "full"))),
        ],
    )
    say(
        "in brackets: 95 % confidence intervals; trained: parameters; time: in training steps; memory: at the peak, a "
        "worker; saved: in final/",
        style="dim",
    )
    for name, key in (("LoRA", "lora"), ("full", "full")):
        say(f"{name}, {reports[key].of(RECALL).verdict}")
    say(f"\n{lesson(reports)} Ask it: What does b.i.d. mean?\n{_chat(results['lora'])}")


def learned(report: Report) -> bool:
    """Whether a tuned model knows beyond noise what its base does not: their intervals share no value."""
    exact = report.of(HELD_OUT).metric("exact_match")
    assert exact.base is not None  # it is measured
    return exact.tuned.value > exact.base.value and not exact.tuned.overlaps(exact.base)


def lesson(reports: dict[str, Report]) -> str:
    """A sentence on what was learned, which is what the figures hold and no more."""
    if failed := [name for name, report in reports.items() if not learned(report)]:
        return f"Nothing is proved of {' and '.join(failed)}: the interval does not lie above that of the model before."
    return "The model learned what prescriptions say: its interval lies above that of the model before."


def _chat(result: Result) -> str:
    return f"  {Path(sys.executable).parent / 'raytune-ds'} chat --run {result.run}"


def _row(name: str, result: Result, report: Report) -> list[Any]:
    return [
        name,
        _percent(_exact(report.of(HELD_OUT))),
        f"{result.progress['last_eval_loss']:.3f}",
        _percent(_exact(report.of(RECALL))),
        human_count(result.trainable_parameters),
        human_time(result.progress["seconds"]),
        f"{max(result.peak_memory_mib):,.0f} MiB",
        f"{result.final_bytes / (1 << 20):.1f} MiB",
    ]


def _exact(measured: Measured) -> Estimate:
    return measured.metric("exact_match").tuned


def _percent(share: Estimate | None) -> str:
    assert share is not None  # the base is measured
    return f"{100 * share.value:.1f}% ({100 * share.low:.0f}–{100 * share.high:.0f})"
