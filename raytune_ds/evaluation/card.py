"""The evaluation in a model card: a section between marks, and the metadata that the Hugging Face hub shows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from raytune_ds import storage
from raytune_ds.evaluation.comparison import Metric, shown
from raytune_ds.evaluation.results import Measured

BEGIN, END = "<!-- raytune_ds evaluation -->", "<!-- end of raytune_ds evaluation -->"
_SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
_ARGS = {"by": "raytune_ds"}
"""Marks the metadata that is ours."""


def update(path: str, name: str, measured: Sequence[Measured]) -> None:
    """Writes or replaces the evaluation in a model card; all else in it stays.

    Args:
        path: of the card; made if it is not there.
        name: of the model.
        measured: all data sets.
    """
    file = Path(path)
    card = ModelCard(file.read_text(encoding="utf-8") if file.is_file() else "---\n{}\n---\n")
    head: Any = card.data  # a ModelCardData
    others = [result for result in head.eval_results or [] if result.dataset_args != _ARGS]
    head.model_name = head.model_name or name
    head.eval_results = [*others, *(result for one in measured for result in _results(one))]
    card.text = with_section(card.text, section(measured))
    storage.write_bytes(path, str(card).encode())


def with_section(text: str, new: str) -> str:
    """A text whose section is a new one, at its place or else at the end."""
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: f"\n\n{new}\n", text)
    return f"{text.rstrip()}\n\n{new}\n"


def section(measured: Sequence[Measured]) -> str:
    """The section, marks included."""
    lines = [BEGIN, "## Evaluation", "", "In brackets: 95 % confidence intervals. n: rows.", ""]
    lines += ["| data | metric | n | base | tuned | difference |", "|---|---|---|---|---|---|"]
    lines += [_row(one.name, metric) for one in measured for metric in one.metrics]
    verdicts = [one.verdict for one in measured if one.verdict]
    return "\n".join([*lines, *([""] if verdicts else []), *(f"- {verdict}" for verdict in verdicts), END])


def _row(name: str, metric: Metric) -> str:
    sides = [shown(metric.base), shown(metric.tuned), shown(metric.difference, sign="+")]
    return f"| {' | '.join([name.replace('|', chr(92) + '|'), metric.name, f'{metric.tuned.n:,}', *sides])} |"


def _results(one: Measured) -> list[EvalResult]:
    """The tuned model's figures."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", one.name),
            dataset_name=one.name,
            dataset_args=_ARGS,
            metric_type=metric.name,
            metric_name=metric.name,
            metric_value=round(metric.tuned.value, 6),
        )
        for metric in one.metrics
        if math.isfinite(metric.tuned.value)
    ]
