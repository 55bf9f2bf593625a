"""Schedulers with the journal in front of them: what is decided once stays decided."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler
from ray.tune.utils.util import flatten_dict

from raytune_ds.config import Config
from raytune_ds.sweep import course as course_module
from raytune_ds.sweep.course import CONTINUE, STOP, Course
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.records import Goal, Report, Trial
from raytune_ds.sweep.schedule import SCHEDULERS, Endings, Recorded
from raytune_ds.sweep.space import Space
from raytune_ds.sweep.trainable import TIME
from tests.unit.test_sweep_journal import made_report

GOAL = Goal(("eval_loss",), ("min",))
KINDS = ["asha", "median", "hyperband", "none"]
REPORTS = 9


class TuneTrial:
    """What Ray Tune's schedulers look at."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"t{number}"
        self.config: dict[str, Any] = {"values": {"adapter.r": number}}
        self.status = "RUNNING"
        self.is_saving = False


class Listener:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def begins(self, trial: Trial) -> None:
        self.heard.append(("begins", trial.number))

    def reported(self, trial: Trial, decision: str) -> None:
        self.heard.append((decision, trial.number))

    def ended(self, trial: Trial) -> None:
        self.heard.append((trial.status, trial.number))


class Tuner:
    """As Ray Tune's controller calls its scheduler, for trials of ours."""

    def __init__(
        self, path: Path | str, kind: str = "asha", inner: TrialScheduler | None = None, **sweep: Any
    ) -> None:
        sweep = {"scheduler": {"kind": kind}, "reports": REPORTS, **sweep}
        config = Config.model_validate({"sweep": {"space": {"adapter.r": {"randint": [1, 99]}}, **sweep}})
        space, self.listener = Space.of(config), Listener()
        self.journal = Journal(str(path))
        self.course = Course(config, space, GOAL, self.journal, self.listener, 3)
        self.scheduler = Recorded(inner or SCHEDULERS[kind](config.sweep, GOAL, space), self.course)
        self.trials: dict[int, TuneTrial] = {}

    def get_trials(self) -> list[TuneTrial]:
        return list(self.trials.values())

    def get_live_trials(self) -> set[TuneTrial]:
        return {trial for trial in self.get_trials() if trial.status not in ("TERMINATED", "ERROR")}

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.trials[number] = TuneTrial(number)
            self.scheduler.on_trial_add(self, self.trials[number])

    def report(self, number: int, report: Report, **result: Any) -> str:
        """What is decided; a trial that is to be stopped is, as by the controller."""
        trial = self.trials[number]
        flat = result_of(number, report, **result)
        decision = self.scheduler.on_trial_result(self, trial, flat)
        if decision == STOP:
            self.scheduler.on_trial_complete(self, trial, flat)
            trial.status = "TERMINATED"
        elif decision == "PAUSE":
            trial.status = "PAUSED"
        return decision

    def stop_trial(self, trial: TuneTrial) -> None:
        """As a scheduler stops one that waits."""
        self.scheduler.on_trial_remove(self, trial)
        trial.status = "TERMINATED"

    def end(self, number: int, report: Report | None, error: str | None = None) -> None:
        """The last report of a trial."""
        result = result_of(number, report, ended=True, done=True, error=error)
        self.scheduler.on_trial_complete(self, self.trials[number], result)
        self.trials[number].status = "TERMINATED"

    def losses(self, number: int, *losses: float) -> list[str]:
        """Decisions at reports from the first on, up to the one to stop."""
        found: list[str] = []
        for n, loss in enumerate(losses, 1):
            if STOP not in found:
                found.append(self.report(number, made_report(n, loss)))
        return found


def result_of(number: int, report: Report | None, **more: Any) -> dict[str, Any]:
    """As a trial reports it, and the controller hands it on."""
    result: dict[str, Any] = {"run": f"/t/{number}", "origin": None, **more}
    if report is not None:
        content = {**report.__dict__, "metrics": dict(report.metrics)}
        result |= {TIME: report.number, "content": content, **report.metrics}
    return dict(flatten_dict(result))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


# ---- what is decided ------------------------------------------------------------------------------


def test_asha_stops_what_is_worse_at_a_rung(file: Path) -> None:
    """At reports 1, 3 and 9 of nine; in between every trial goes on."""
    tuner = Tuner(file)
    tuner.add(1, 2, 3)
    assert tuner.losses(1, 2.0, 9.0) == [CONTINUE, CONTINUE]
    assert tuner.losses(2, 3.0) == [STOP]
    assert tuner.losses(3, 1.0, 9.0, 1.0, 9.0) == [CONTINUE] * 4
    assert tuner.report(1, made_report(3, 2.0)) == STOP
    tuner.end(3, made_report(9, 1.0))
    assert [(t.status, t.reason) for t in tuner.journal.trials] == [
        ("stopped", "by asha at report 3"),
        ("stopped", "by asha at report 1"),
        ("finished", None),
    ]
    assert tuner.listener.heard[-3:] == [("stopped", 1), ("END", 3), ("finished", 3)]
    assert "AsyncHyperBand" in tuner.scheduler.debug_string()


def test_the_median_of_three_others_stops(file: Path) -> None:
    """Nobody is stopped before there are so many."""
    tuner = Tuner(file, "median")
    tuner.add(1, 2, 3, 4, 5)
    for number in (1, 2, 3):
        assert tuner.losses(number, 2.0, 2.0) == [CONTINUE] * 2
    assert tuner.losses(4, 3.0) == [STOP]
    assert tuner.losses(5, 1.0, 1.0) == [CONTINUE] * 2


def test_none_stops_nobody(file: Path) -> None:
    """Whatever they report."""
    tuner = Tuner(file, "none")
    tuner.add(1, 2, 3)
    assert [tuner.losses(n, *range(REPORTS - 1)) for n in (1, 2, 3)] == [[CONTINUE] * (REPORTS - 1)] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_metric_that_is_no_number_stops(file: Path, kind: str, loss: float | None) -> None:
    """The scheduler, which could not compare it, never hears of it; neither then nor when it is replayed."""
    for _ in range(2):
        tuner = Tuner(file, kind)
        tuner.add(1, 2, 3, 4, 5)
        assert tuner.report(1, made_report(1, loss)) == STOP
        tuner.end(2, made_report(REPORTS, loss))
        for number in (3, 4, 5):
            tuner.report(number, made_report(1, 2.0))
        tuner.end(3, None)
        trials = tuner.journal.trials
        assert [(t.status, t.reason) for t in trials[:3]] == [
            ("stopped", "its eval_loss is not a number"),
            ("finished", None),
            ("finished", None),
        ]
        assert trials[3].status == trials[4].status == "running"


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_tokens_stops_all_at_their_next_report(file: Path, kind: str) -> None:
    """Those of all trials count; what is decided already stays, when the sweep goes on with a larger budget."""
    tuner = Tuner(file, kind, budget={"tokens": 300})
    tuner.add(1, 2, 3)
    assert [tuner.report(n, made_report(1, 2.0 / n)) for n in (1, 2)].count(STOP) == 0
    assert (tuner.course.tokens, tuner.course.is_over) == (200, False)
    tuner.report(2, made_report(2, 0.5))
    assert (tuner.course.tokens, tuner.course.spent) == (300, "sweep.budget.tokens is used up")
    assert tuner.report(3, made_report(1, 0.1)) == STOP
    assert tuner.report(1, made_report(2, 0.1)) == STOP
    assert tuner.journal.trial(1).reason == "sweep.budget.tokens is used up"

    again = Tuner(file, kind)
    again.add(1, 2, 3)
    assert again.report(3, made_report(1, 0.1)) == STOP
    then = [event["decision"] for event in again.journal.events[3:5]]
    assert [again.report(n, made_report(1, 2.0 / n)) for n in (1, 2)] == then


@pytest.mark.parametrize(
    ("budget", "hours", "reason"),
    [
        ({"hours": 2}, 1.9, None),
        ({"hours": 2}, 2.0, "sweep.budget.hours is used up"),
        ({"money": 8, "price_per_hour": 4}, 1.9, None),
        ({"money": 8, "price_per_hour": 4}, 2.1, "sweep.budget.money is used up"),
    ],
)
def test_a_budget_of_hours_or_money_stops(
    file: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, float], hours: float, reason: str | None
) -> None:
    """The clock is that of all launches."""
    now = 0.0
    monkeypatch.setattr(course_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(course_module.time, "time", lambda: now)
    for start in (0.0, 90000.0):
        now = start
        Journal(str(file)).launch()
        tuner = Tuner(file, budget=budget)
        tuner.add(*([1] if start == 0 else [1, 2]))
        now += hours / 2 * 3600
        decision = tuner.report(1 if start == 0 else 2, made_report(1, 1.0 / (start + 1)))
    assert tuner.course.hours == pytest.approx(hours)
    assert (decision == STOP, tuner.course.spent) == (reason is not None, reason)
    assert tuner.journal.trial(2).reason == reason


class Verdict(TrialScheduler):
    """Says the same of all, rolls dice, and remembers what it was told."""

    def __init__(self, decision: str = CONTINUE) -> None:
        super().__init__()
        self.decision = decision
        self.told: list[tuple[str, Any]] = []
        self.rolled: list[tuple[float, float]] = []

    def roll(self) -> None:
        self.rolled.append((random.random(), float(np.random.random())))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.roll()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.roll()
        self.told.append((trial.trial_id, result[TIME]))
        return self.decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.told.append((trial.trial_id, "complete"))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.told.append((trial.trial_id, "remove"))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.told.append((trial.trial_id, "error"))


@pytest.mark.parametrize("then", [CONTINUE, STOP])
@pytest.mark.parametrize("now", [CONTINUE, STOP, "PAUSE"])
def test_what_the_journal_has_is_decided(file: Path, then: str, now: str) -> None:
    """A fresh scheduler learns of the report, but can't change its mind."""
    first = Tuner(file, inner=Verdict(then))
    first.add(1)
    assert first.report(1, made_report(1)) == then
    lines = len(first.journal.events)
    inner = Verdict(now)
    again = Tuner(file, inner=inner)
    again.add(1)
    assert again.report(1, made_report(1)) == then
    assert inner.told[0] == ("t1", 1)
    assert len(again.journal.events) == lines
    assert again.listener.heard == ([("begins", 1)] if then == CONTINUE else [])
    if then == CONTINUE:
        assert again.report(1, made_report(2)) == now  # this one is new


def test_a_pause_is_decided_anew(file: Path) -> None:
    """It follows from who else is there, and a trial that waits leaves its room to others."""
    first = Tuner(file, inner=Verdict("PAUSE"))
    first.add(1, 2, 3)
    assert not first.course.has_room
    assert first.report(1, made_report(1)) == "PAUSE"
    assert first.course.has_room
    again = Tuner(file, inner=Verdict(CONTINUE))
    again.add(1, 2, 3)
    assert again.report(1, made_report(1)) == CONTINUE
    assert not again.course.has_room
    again.end(1, made_report(REPORTS))
    assert again.course.has_room


def test_a_report_that_comes_again_is_not_told_again(file: Path) -> None:
    """A trial whose actor died begins anew, and its reports with it; those of another run are others."""
    inner = Verdict()
    tuner = Tuner(file, inner=inner)
    tuner.add(1)
    assert [tuner.report(1, made_report(n)) for n in (1, 2, 1, 2)] == [CONTINUE] * 4
    assert tuner.report(1, made_report(2), run="/t/1-from-2") == CONTINUE
    assert inner.told == [("t1", 1), ("t1", 2), ("t1", 2)]
    assert [e["report"]["number"] for e in tuner.journal.events if e["event"] == "report"] == [1, 2, 2]


def test_dice_fall_alike_after_a_crash_and_others_are_left_alone(file: Path) -> None:
    """Whatever was rolled in between."""

    def rolled() -> list[tuple[float, float]]:
        inner = Verdict()
        tuner = Tuner(file, inner=inner)
        random.seed(7)
        np.random.seed(7)
        tuner.add(1, 2)
        tuner.losses(1, 2.0, 2.0)
        assert (random.random(), np.random.random()) == (dice.random(), arrays.random_sample())
        return inner.rolled

    dice, arrays = random.Random(7), np.random.RandomState(7)
    first = rolled()
    dice, arrays = random.Random(7), np.random.RandomState(7)
    assert rolled() == first
    assert len(set(first)) == 4


def test_asha_leaves_the_dice_alone(file: Path) -> None:
    """It rolls them for each trial."""
    tuner = Tuner(file)
    np.random.seed(7)
    tuner.add(1, 2, 3)
    assert np.random.random() == np.random.RandomState(7).random_sample()


def test_how_trials_end_is_written_once(file: Path) -> None:
    """Finished, failed with or without a report, removed while waiting, or with its process."""
    inner = Verdict()
    tuner = Tuner(file, inner=inner)
    tuner.add(1, 2, 3, 4, 5)
    tuner.end(1, made_report(REPORTS, 1.5))
    tuner.end(2, made_report(4), error="worker 0 died")
    tuner.end(3, None, error="the data can't be read")
    tuner.scheduler.on_trial_remove(tuner, tuner.trials[4])
    died: Any = tuner.trials[5]
    died.get_pickled_error = lambda: None
    died.get_error = lambda: "Traceback\n  ...\nActorDiedError: lost"
    tuner.scheduler.on_trial_error(tuner, died)
    Endings(tuner.course).on_trial_error(1, [], died)
    assert [(t.status, t.reason, t.last and t.last.number) for t in tuner.journal.trials] == [
        ("finished", None, REPORTS),
        ("failed", "worker 0 died", 4),
        ("failed", "the data can't be read", None),
        ("stopped", "by asha", None),
        ("failed", "ActorDiedError: lost", None),
    ]
    assert inner.told == [
        ("t1", "complete"),
        ("t2", "error"),
        ("t3", "error"),
        ("t4", "remove"),
        ("t5", "error"),
    ]
    assert tuner.course.has_room
    assert tuner.course.is_done(5)
    events = len(tuner.journal.events)
    again = Tuner(file, inner=Verdict())
    again.add(1, 2, 3, 4, 5)
    assert again.trials[2].config["ended"].reason == "worker 0 died"
    assert again.trials[1].config["ended"].reason is None
    again.end(1, made_report(REPORTS, 1.5))
    again.end(2, made_report(4), error="worker 0 died")
    assert len(again.journal.events) == events


def test_a_sweep_gives_up_if_all_fail(file: Path) -> None:
    """A single report of a trial that has not failed is hope."""
    tuner = Tuner(file, give_up_after=2)
    tuner.add(1, 2, 3)
    tuner.end(1, None, error="a")
    assert not tuner.course.is_over
    tuner.end(2, made_report(1), error="a")
    assert tuner.course.is_hopeless
    assert not tuner.course.is_done(3)
    tuner.report(3, made_report(1))
    assert not tuner.course.is_over


def test_a_trial_that_copies_anothers_config_is_still_itself(file: Path) -> None:
    """Population-based schedulers copy all of it, the number too; its new values are written at its report."""

    class Copies(Verdict):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            one, two = tune_controller.get_trials()
            two.config = {**one.config, "values": {"adapter.r": 77}}
            return "PAUSE"

    tuner = Tuner(file, inner=Copies())
    tuner.add(1, 2)
    tuner.report(2, made_report(1))
    assert [t.config["trial"] for t in tuner.get_trials()] == [1, 2]
    assert [t.values for t in tuner.journal.trials] == [{"adapter.r": 1}, {"adapter.r": 77}]
    assert tuner.journal.first_values(2) == {"adapter.r": 2}


# ---- after a crash --------------------------------------------------------------------------------


def play(tuner: Tuner, order: list[int], losses: dict[int, list[float]]) -> dict[int, list[str]]:
    """Decisions at each report of each trial, whose reports come in this order.

    Those from before a crash come first, of one trial after the other, for each has them from its own files.
    """
    tuner.add(*losses)
    found: dict[int, list[str]] = {number: [] for number in losses}

    def step(number: int) -> None:
        n = len(found[number]) + 1
        if STOP in found[number] or n > REPORTS:
            return
        report = made_report(n, losses[number][n - 1])
        if n < REPORTS:
            found[number].append(tuner.report(number, report))
        else:
            tuner.end(number, report)
            found[number].append("END")

    before = {trial.number: len(trial.reports) for trial in tuner.journal.trials}
    for number in reversed(losses):
        for _ in range(before[number]):
            step(number)
    done = dict(before)
    for number in order:
        if done[number]:
            done[number] -= 1
        else:
            step(number)
    return found


LOSSES = st.integers(0, 60).map(lambda tenths: tenths / 10 if tenths else math.nan)


@given(st.data())
@settings(max_examples=6, deadline=None)
def test_after_a_crash_at_any_time_the_rest_is_decided_as_if_there_had_been_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever had been written by then, and in whatever order it comes again."""
    losses = {n: data.draw(st.lists(LOSSES, min_size=REPORTS, max_size=REPORTS)) for n in (1, 2, 3)}
    order = data.draw(st.permutations([n for n in losses for _ in range(REPORTS)]))
    file = tmp_path_factory.mktemp("sweep") / "journal.jsonl"
    undisturbed = Tuner(file)
    decisions = play(undisturbed, order, losses)
    trials = undisturbed.journal.trials
    lines = file.read_bytes().splitlines(keepends=True)
    for cut in range(len(lines) + 1):
        file.write_bytes(b"".join(lines[:cut]))
        again = Tuner(file)
        assert play(again, order, losses) == decisions
        assert again.journal.trials == trials


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_median_keeps_to_what_it_decided_in_whatever_order_it_comes_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Its verdict depends on who has reported before, so a fresh one would now and then decide otherwise."""
    losses = {n: data.draw(st.lists(LOSSES, min_size=REPORTS, max_size=REPORTS)) for n in range(1, 6)}
    order = data.draw(st.permutations([n for n in losses for _ in range(REPORTS)]))
    file = tmp_path_factory.mktemp("sweep") / "journal.jsonl"
    decisions = play(Tuner(file, "median"), order, losses)
    again = Tuner(file, "median")
    assert play(again, order, losses) == decisions


def test_hyperband_comes_to_the_same_in_whatever_order_it_comes_again(file: Path) -> None:
    """Its second bracket has five trials, two of which are left at report 3; it does not fall for a later report."""

    def play_rounds(tuner: Tuner, order: list[int], ahead: int) -> list[int]:
        """Each trial up to its pause, and trial 8 as far ahead as it may; those left of the bracket."""
        tuner.add(*range(1, 9))
        for number in order:
            for n in range(1, 4):
                tuner.report(number, made_report(n, 9.0 - number))
        trial = tuner.trials[8]
        for n in range(4, ahead):
            if scheduler.choose_trial_to_run(tuner) is trial or trial.status == "RUNNING":
                trial.status = "RUNNING"
                tuner.report(8, made_report(n, 99.0))
        return [t.number for t in tuner.journal.trials[3:] if t.status == "running"]

    first = Tuner(file, "hyperband")
    scheduler = first.scheduler
    assert play_rounds(first, [4, 5, 6, 7, 8], ahead=6) == [7, 8]
    for order in ([8, 7, 6, 5, 4], [6, 8, 4, 7, 5]):
        again = Tuner(file, "hyperband")
        scheduler = again.scheduler
        events = len(again.journal.events)
        assert play_rounds(again, order, ahead=6) == [7, 8]
        assert len(again.journal.events) == events
        assert again.report(8, made_report(6, 99.0)) == CONTINUE


def test_hyperband_goes_on_without_a_trial_that_is_lost_in_a_later_round(file: Path) -> None:
    """Of nine three are left at report 1; two of them wait at report 3, where the last one is no number."""
    tuner = Tuner(file, "hyperband")
    tuner.add(*range(1, 18))
    for number in range(9, 18):
        tuner.report(number, made_report(1, 1.0 * number))
    assert [n for n in range(9, 18) if tuner.journal.trial(n).status == "running"] == [9, 10, 11]
    for number in (9, 10, 11):
        tuner.trials[number].status = "RUNNING"
    assert [tuner.report(number, made_report(3, 1.0)) for number in (9, 10)] == ["PAUSE", "PAUSE"]
    assert tuner.report(11, made_report(3, float("nan"))) == STOP
    for number in range(1, 9):
        tuner.trials[number].status = "TERMINATED"  # of other brackets
    chosen = tuner.scheduler.choose_trial_to_run(tuner)
    assert chosen in (tuner.trials[9], tuner.trials[10])


def test_trials_that_a_budget_stopped_go_on_with_a_larger_one(file: Path) -> None:
    tuner = Tuner(file, budget={"tokens": 300})
    tuner.add(1, 2)
    reports = [(1, 1), (2, 2), (1, 2)]  # what is spent is known when the next one comes
    assert [tuner.report(n, made_report(at, 1.0)) for n, at in reports] == [CONTINUE, CONTINUE, STOP]
    same = Tuner(file, budget={"tokens": 300})
    same.course.go_on()
    assert same.journal.trial(1).status == "stopped"
    more = Tuner(file, budget={"tokens": 9000})
    more.course.go_on()
    assert more.journal.trial(1).status == "running"
    more.add(1, 2)
    assert more.trials[1].config["ended"] is None
    assert [more.report(1, made_report(at, 1.0)) for at in (1, 2)] == [CONTINUE, CONTINUE]


@pytest.mark.parametrize("gone", ["TERMINATED", "ERROR"])
def test_a_population_does_not_wait_for_one_that_is_gone(tmp_path: Path, gone: str) -> None:
    """Two wait at their first report for a third, which ends without one: they are let on to the second."""
    space = Space.of(
        Config.model_validate({"sweep": {"space": {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}}})
    )
    pbt = SCHEDULERS["pbt"](Config().sweep, GOAL, space)
    tuner = Tuner(tmp_path / "journal.jsonl", inner=pbt)
    tuner.trials = {number: TuneTrial(number) for number in (1, 2, 3)}
    times = {1: 1, 2: 1, 3: 0}
    pbt._trial_state = {t: SimpleNamespace(last_train_time=times[n]) for n, t in tuner.trials.items()}
    for number in (1, 2):
        tuner.trials[number].status = "PAUSED"
    assert tuner.scheduler.choose_trial_to_run(tuner) is None, "the third still runs"
    tuner.trials[3].status = gone
    tuner.trials[2].is_saving = True
    assert tuner.scheduler.choose_trial_to_run(tuner) is None, "the second is not there yet"
    tuner.trials[2].is_saving = False
    assert tuner.scheduler.choose_trial_to_run(tuner) in (tuner.trials[1], tuner.trials[2])
    assert pbt._next_perturbation_sync == 2


def test_those_that_wait_end_when_the_budget_is_used_up(tmp_path: Path) -> None:
    tuner = Tuner(tmp_path / "journal.jsonl", "hyperband", budget={"tokens": 1})
    tuner.add(1, 2)
    tuner.course.report(tuner.trials[1], made_report(1), "PAUSE", result_of(1, made_report(1)))
    for trial in tuner.get_trials():
        trial.status = "PAUSED"
    assert tuner.scheduler.choose_trial_to_run(tuner) is None
    assert [trial.status for trial in tuner.journal.trials] == ["stopped", "stopped"]
