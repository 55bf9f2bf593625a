"""Trials of a sweep: which is better, and which no other one beats."""

from __future__ import annotations

import math

import pytest

from raytune_ds.sweep.records import Goal, Report, Status, Trial

LOSS = Goal(("eval_loss",), ("min",))
SCORE = Goal(("score",), ("max",))
BOTH = Goal(("eval_loss", "tokens_per_s"), ("min", "max"))


def trial(number: int, *losses: float | None, status: Status = "finished", **more: float | None) -> Trial:
    """A report for each loss; `more` metrics are the same in all."""
    reports = [
        Report(n, n, len(losses), 100 * n, 1.0 * n, {"eval_loss": loss, **more})
        for n, loss in enumerate(losses, 1)
    ]
    return Trial(number, {"adapter.r": number}, status, tuple(reports))


def numbers(trials: list[Trial]) -> list[int]:
    return [t.number for t in trials]


def test_the_newest_report_decides_not_the_best_one() -> None:
    """A trial that got worse again is worse."""
    assert numbers(LOSS.ranked([trial(1, 3.0, 1.0, 2.5), trial(2, 3.0, 2.0), trial(3, 4.0)])) == [2, 1, 3]


def test_max_puts_the_largest_first() -> None:
    """Whatever the metric is called."""
    trials = [trial(n, 1.0, score=score) for n, score in ((1, 0.2), (2, 0.9), (3, 0.5))]
    assert numbers(SCORE.ranked(trials)) == [2, 3, 1]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("goal", [LOSS, Goal(("eval_loss",), ("max",))])
def test_those_without_a_number_come_last_in_their_order(goal: Goal, nothing: float | None) -> None:
    """However small or large it would be, and those that have not reported at all."""
    trials = [trial(4, nothing), trial(3), trial(2, 1.0, nothing), trial(1, 5.0)]
    assert numbers(goal.ranked(trials)) == [1, 2, 3, 4]
    assert [t.value("eval_loss") for t in trials] == [None, None, None, 5.0]


def test_of_equal_ones_the_first_suggested_comes_first() -> None:
    """In whatever order they are given."""
    assert numbers(LOSS.ranked([trial(3, 2.0), trial(1, 2.0), trial(2, 2.0)])) == [1, 2, 3]


def test_the_best_did_not_fail() -> None:
    """It is ranked all the same."""
    trials = [trial(1, 1.0, status="failed"), trial(2, 2.0, status="stopped"), trial(3, 3.0)]
    best = LOSS.best(trials)
    assert best is not None
    assert best.number == 2
    assert numbers(LOSS.ranked(trials)) == [1, 2, 3]


@pytest.mark.parametrize("trials", [[], [trial(1, 1.0, status="failed")], [trial(1), trial(2, None)]])
def test_there_may_be_no_best(trials: list[Trial]) -> None:
    """Nor a front."""
    assert LOSS.best(trials) is None
    assert LOSS.pareto(trials) == set()


def test_pareto_keeps_what_no_other_one_beats_in_every_metric() -> None:
    """Low loss and many tokens a second are wanted: 4 is beaten by 2, 5 by 1, which is as fast."""
    points = {1: (1.0, 10.0), 2: (2.0, 30.0), 3: (3.0, 40.0), 4: (2.5, 20.0), 5: (1.1, 10.0)}
    trials = [trial(n, loss, tokens_per_s=speed) for n, (loss, speed) in points.items()]
    assert BOTH.pareto(trials) == {1, 2, 3}


def test_pareto_keeps_all_of_equal_ones() -> None:
    """None of them beats the other."""
    assert BOTH.pareto([trial(1, 1.0, tokens_per_s=5.0), trial(2, 1.0, tokens_per_s=5.0)]) == {1, 2}


def test_pareto_leaves_out_failed_ones_and_those_that_lack_a_metric() -> None:
    """What is not known can't be compared."""
    trials = [
        trial(1, 0.5, status="failed", tokens_per_s=50.0),
        trial(2, 0.6),
        trial(3, 0.7, tokens_per_s=math.nan),
        trial(4, 9.0, tokens_per_s=1.0),
    ]
    assert BOTH.pareto(trials) == {4}


def test_the_front_of_one_metric_is_the_best() -> None:
    """One objective has one optimum."""
    assert LOSS.pareto([trial(1, 2.0), trial(2, 1.0), trial(3, 3.0)]) == {2}


def test_names_sort_as_numbers_do() -> None:
    """They are those of run directories."""
    assert [trial(n).name for n in (7, 10, 12345)] == ["0007", "0010", "12345"]
