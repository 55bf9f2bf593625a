"""Confidence intervals against scipy, by hand, and by how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from raytune_ds.evaluation import intervals
from raytune_ds.evaluation.intervals import Estimate, mean, rate, ratio, resampled, share, share_difference


def test_rates_have_wilson_s_interval() -> None:
    none, all_of_them = rate(0, 180), rate(180, 180)
    z2 = 1.959964**2
    assert none.value == 0
    assert none.low == 0
    assert none.high == pytest.approx(z2 / (180 + z2), rel=1e-5)  # what Wilson's formula is for no hit
    assert (all_of_them.low, all_of_them.high) == pytest.approx((1 - none.high, 1))
    some = rate(81, 263)  # the first example of Newcombe, 1998
    assert (some.low, some.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_the_bootstrap_is_scipy_s() -> None:
    values = np.random.default_rng(3).gamma(2.0, 1.0, 60)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=intervals.RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = resampled(mean, [values], seed=5)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)
    # And near what the normal distribution says of so many rows.
    half = 1.96 * values.std(ddof=1) / math.sqrt(60)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert resampled(mean, [values], 1) == resampled(mean, [values], 1)
    assert resampled(mean, [values], 1) != resampled(mean, [values], 2)


def test_many_rows_take_percentiles() -> None:
    values = np.random.default_rng(0).random(intervals.BCA_ROWS + 1)
    found = resampled(mean, [values], 0)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=half / 8
    )


def test_a_mean_over_tokens_weighs_rows_by_their_tokens() -> None:
    sums, weights = np.array([2.0, 30.0, 1.0]), np.array([1.0, 10.0, 2.0])
    assert resampled(ratio, [sums, weights], 0).value == pytest.approx(33 / 13)


@pytest.mark.parametrize("kind", ["tokens", "rate", "difference"])
def test_the_true_value_is_in_about_95_of_100(kind: str) -> None:
    rng = np.random.default_rng(11)
    trials = {"tokens": _tokens, "rate": _rate, "difference": _difference}
    held = [trials[kind](rng, seed) for seed in range(300)]
    assert 0.91 <= np.mean(held) <= 0.98


def _tokens(rng: np.random.Generator, seed: int) -> bool:
    weights = rng.integers(1, 40, 60).astype(float)
    losses = rng.gamma(4.0, 0.5, 60)  # a mean of 2 nats, whatever the length
    return _holds(resampled(ratio, [losses * weights, weights], seed), 2.0)


def _rate(rng: np.random.Generator, seed: int) -> bool:
    return _holds(share((rng.random(60) < 0.9).astype(float), seed), 0.9)


def _difference(rng: np.random.Generator, seed: int) -> bool:
    hard = rng.random(60)  # rows are hard for both: base knows the easiest half, tuned eight tenths
    noise = rng.normal(0, 0.05, (2, 60))
    base, tuned = (hard + noise[0] < 0.5), (hard + noise[1] < 0.8)
    return _holds(share_difference(base.astype(float), tuned.astype(float), seed), 0.3)


def _holds(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def test_a_difference_is_taken_row_by_row() -> None:
    """Rows differ much, and the change in each is the same but for a little: unpaired it would drown."""
    rng = np.random.default_rng(0)
    before = rng.random(40) * 0.8
    after = before + 0.1 + rng.normal(0, 0.01, 40)
    found = share_difference(before, after, 0)
    assert found.value == pytest.approx(0.1, abs=0.01)
    assert found.is_above_zero
    assert found.high - found.low < 0.02
    apart = share(after, 0), share(before, 0)
    assert apart[0].overlaps(apart[1])


def test_a_difference_that_is_the_same_in_all_rows_still_has_an_interval() -> None:
    nothing, everything = np.zeros(50), np.ones(50)
    risen = share_difference(nothing, everything, 0)
    assert risen.value == 1
    assert 0.85 < risen.low < 0.92, "two Wilson intervals of 50 rows, combined"
    assert risen.high == 1
    same = share_difference(nothing, nothing, 0)
    assert same.low < 0 < same.high
    assert not same.is_above_zero
    assert not same.is_below_zero


def test_one_row_tells_nothing_of_others() -> None:
    found = resampled(mean, [np.array([0.3])], 0)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert rate(1, 1).low < 0.25
