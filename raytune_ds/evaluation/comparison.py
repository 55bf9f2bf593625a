"""Outcomes of rows to figures of a data set: each side's, their difference, and what it means. n = rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raytune_ds.evaluation import intervals
from raytune_ds.evaluation.intervals import Estimate
from raytune_ds.evaluation.items import BASE, TUNED, Outcome
from raytune_ds.evaluation.metrics import ANSWER_METRICS


@dataclass(frozen=True)
class Metric:
    """One figure of a data set.

    Attributes:
        tuned, base: of the two sides; no base if it was not measured.
        difference: tuned minus base, both on the same rows.
        less_is_better: as of a loss.
    """

    name: str
    tuned: Estimate
    base: Estimate | None = None
    difference: Estimate | None = None
    less_is_better: bool = False

    @property
    def is_worse(self) -> bool:
        """The tuned model, beyond noise."""
        if self.difference is None:
            return False
        return self.difference.is_above_zero if self.less_is_better else self.difference.is_below_zero

    @property
    def is_better(self) -> bool:
        """The tuned model, beyond noise."""
        if self.difference is None:
            return False
        return self.difference.is_below_zero if self.less_is_better else self.difference.is_above_zero


def compared(outcomes: Sequence[dict[str, Outcome]], seed: int) -> tuple[Metric, ...]:
    """All figures of the rows of one data set.

    Args:
        outcomes: of each row what each side made of it.
        seed: of the bootstrap.
    """
    return (*_of_losses(outcomes, seed), *_of_answers(outcomes, seed))


def _of_losses(outcomes: Sequence[dict[str, Outcome]], seed: int) -> list[Metric]:
    """Per supervised token, as training weighs them; rows are resampled whole."""
    weights = np.array([row[TUNED].weight for row in outcomes])
    sums = {side: np.array([row[side].loss for row in outcomes]) for side in outcomes[0]}
    losses = {
        side: intervals.resampled(intervals.ratio, [values, weights], seed) for side, values in sums.items()
    }
    found = {"loss": losses, "perplexity": {side: _exponential(loss) for side, loss in losses.items()}}
    rises: dict[str, Estimate] = {}
    if BASE in sums:
        pair = [sums[BASE], sums[TUNED], weights]
        rises = {
            "loss": intervals.resampled(_loss_rise, pair, seed),
            "perplexity": intervals.resampled(_perplexity_rise, pair, seed),
        }
    return [
        Metric(name, sides[TUNED], sides.get(BASE), rises.get(name), less_is_better=True)
        for name, sides in found.items()
    ]


def _of_answers(outcomes: Sequence[dict[str, Outcome]], seed: int) -> list[Metric]:
    asked = [row for row in outcomes if row[TUNED].answer is not None]
    if not asked:
        return []
    found = []
    for name in ANSWER_METRICS:
        values = {side: np.array([row[side].scores[name] for row in asked]) for side in asked[0]}
        tuned = intervals.share(values[TUNED], seed)
        if BASE not in values:
            found.append(Metric(name, tuned))
            continue
        rise = intervals.share_difference(values[BASE], values[TUNED], seed)
        found.append(Metric(name, tuned, intervals.share(values[BASE], seed), rise))
    return found


def _loss_rise(base: np.ndarray, tuned: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    return intervals.ratio(tuned, weights, axis) - intervals.ratio(base, weights, axis)


def _perplexity_rise(base: np.ndarray, tuned: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.exp(intervals.ratio(tuned, weights, axis)) - np.exp(intervals.ratio(base, weights, axis))


def _exponential(loss: Estimate) -> Estimate:
    """Perplexity: resampling commutes with a function that only rises, so its interval is that of the loss."""
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(x)) for x in (loss.value, loss.low, loss.high))
    return Estimate(value, low, high, loss.n)


def verdict(name: str, metrics: Sequence[Metric]) -> str | None:
    """A sentence on whether the tuned model has become worse on a general set; None without a base to compare with."""
    by_name = {metric.name: metric for metric in metrics}
    told = [by_name[key] for key in ("loss", "exact_match", "f1") if key in by_name]
    if all(metric.difference is None for metric in told):
        return None
    worse = [metric for metric in told if metric.is_worse]
    better = [metric for metric in told if metric.is_better]
    if worse:
        return f"{name}: the tuned model is worse than its base beyond noise: {_changes(worse)}."
    if better:
        return f"{name}: nothing is lost; the tuned model is better than its base: {_changes(better)}."
    return f"{name}: the tuned model differs from its base by no more than noise: {_changes(told)}."


def _changes(metrics: Sequence[Metric]) -> str:
    return ", ".join(
        f"{metric.name} {shown(metric.difference, sign='+')}" for metric in metrics if metric.difference
    )


def shown(estimate: Estimate | None, sign: str = "") -> str:
    """A value with its interval; with a plus before it where `sign` is one."""
    if estimate is None:
        return "-"
    low, high = (_number(end, sign) for end in (estimate.low, estimate.high))
    return f"{_number(estimate.value, sign)} [{low}, {high}]"


def _number(value: float, sign: str) -> str:
    if not math.isfinite(value):
        return "?"
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 0
    return f"{value:{sign}.{decimals}f}"
