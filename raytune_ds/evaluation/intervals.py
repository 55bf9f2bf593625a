"""What is measured on some rows, and the interval in which it lies for all rows like them, with 95 % confidence.

Rates that are counted (exact match) get Wilson's score interval, everything else a bootstrap over rows: both sides of a
difference are resampled together, row by row. A bootstrap of values that are all the same has no width at all; where
these are shares from 0 to 1, Wilson's interval stands in for it, which is too wide rather than too narrow.

Nothing here knows of models. n = rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 4000
BCA_ROWS = 5000
"""The bias correction takes n squared steps; with more rows than this it has nothing left to correct."""
_BATCH_VALUES = 1 << 22

Values = np.ndarray
Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: on the rows that were measured.
        low, high: ends of the interval; infinite where there is a single row to tell by.
        n: rows.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def is_above_zero(self) -> bool:
        """Beyond noise."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Beyond noise."""
        return self.high < 0

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a value."""
        return self.low <= other.high and other.low <= self.high


def rate(hits: int, n: int) -> Estimate:
    """The share of rows that are right."""
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(interval.low), float(interval.high), n)


def share(values: Values, seed: int) -> Estimate:
    """The mean of values from 0 to 1: a rate if all are one or the other."""
    if np.isin(values, (0, 1)).all():
        return rate(int(values.sum()), len(values))
    if np.ptp(values) == 0:
        around = _wilson(float(values[0]), len(values))
        return Estimate(float(values[0]), *around, len(values))
    return resampled(mean, [values], seed)


def share_difference(before: Values, after: Values, seed: int) -> Estimate:
    """How much the mean of values from 0 to 1 has risen, both of the same rows.

    Where it has risen by the same in each row, the intervals of both are combined, which `risen` does.
    """
    if np.ptp(after - before) > 0:
        return resampled(_mean_difference, [before, after], seed)
    return risen(share(before, seed), share(after, seed))


def risen(before: Estimate, after: Estimate) -> Estimate:
    """A difference from the intervals of two estimates, as if they were independent.

    It is Newcombe's (1998, method 10) for two rates, and of two symmetric intervals the usual root of squares.
    """
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Estimate(value, low, high, after.n)


def resampled(statistic: Statistic, samples: Sequence[Values], seed: int) -> Estimate:
    """A statistic of rows, with its bootstrap interval: BCa, or percentiles of more than BCA_ROWS rows.

    Args:
        statistic: of as many arrays as there are samples, and `axis`, along which the rows lie.
        samples: of equal length, what is known of each row.
        seed: of the resampling.
    """
    n, value = len(samples[0]), float(statistic(*samples, axis=-1))
    if n < 2:
        return Estimate(value, -math.inf, math.inf, n)
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(value, value, value, n)
    interval = _bootstrap(statistic, samples, seed, "BCa" if n <= BCA_ROWS else "percentile")
    if not all(
        map(math.isfinite, interval)
    ):  # BCa has no answer where leaving out any one row changes nothing
        interval = _bootstrap(statistic, samples, seed, "percentile")
    return Estimate(value, *interval, n)


def _bootstrap(
    statistic: Statistic, samples: Sequence[Values], seed: int, method: str
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that data are degenerate shows in what is returned
        found = stats.bootstrap(
            tuple(samples),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, _BATCH_VALUES // len(samples[0])),
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)


def mean(values: Values, axis: int = -1) -> np.ndarray:
    """The mean of rows."""
    return values.mean(axis=axis)


def ratio(sums: Values, weights: Values, axis: int = -1) -> np.ndarray:
    """The mean over all tokens: sums of rows over their weights."""
    return sums.sum(axis=axis) / weights.sum(axis=axis)


def _mean_difference(before: Values, after: Values, axis: int = -1) -> np.ndarray:
    return after.mean(axis=axis) - before.mean(axis=axis)


def _wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share that need not be a count."""
    z2 = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) ** 2
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return centre - half, centre + half
