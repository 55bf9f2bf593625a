"""Figures in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from raytune_ds.console import say, table, warn
from raytune_ds.evaluation.comparison import Metric, shown
from raytune_ds.evaluation.results import Measured

SHOWN_UNFIT = 3


def show(measured: Sequence[Measured], unfit: Sequence[str]) -> None:
    """A table of all figures, what was forgotten, and what could not be measured.

    Args:
        measured: data sets.
        unfit: rows that could not be rendered, and why.
    """
    for reason in unfit[:SHOWN_UNFIT]:
        warn(f"left out: {reason}")
    if len(unfit) > SHOWN_UNFIT:
        warn(f"left out: {len(unfit) - SHOWN_UNFIT:,} more rows")
    for one in measured:
        _figures(one)
    say(
        "in brackets: 95 % confidence intervals; green: better than the base beyond noise, red: worse",
        style="dim",
    )
    for one in measured:
        for side, number in one.num_cut_off.items():
            if number:
                say(
                    f"{one.name}: {number:,} answers of the {side} model were cut off after "
                    f"{one.settings['max_new_tokens']} tokens",
                    style="dim",
                )
        if one.verdict:
            say(one.verdict)


def _figures(one: Measured) -> None:
    with_base = any(metric.base for metric in one.metrics)
    n = max(metric.tuned.n for metric in one.metrics)
    table(
        f"{one.name}, {n:,} rows",
        ["", *(["base", "tuned", "difference"] if with_base else ["tuned"])],
        [_row(metric, with_base) for metric in one.metrics],
        [_style(metric) for metric in one.metrics],
    )


def _row(metric: Metric, with_base: bool) -> list[str]:
    tuned = shown(metric.tuned)
    if not with_base:
        return [metric.name, tuned]
    return [metric.name, shown(metric.base), tuned, shown(metric.difference, sign="+")]


def _style(metric: Metric) -> str | None:
    return "red" if metric.is_worse else "green" if metric.is_better else None
