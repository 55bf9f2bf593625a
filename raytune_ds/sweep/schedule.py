"""What stops trials early or changes them as they go: Ray Tune's schedulers, with the journal in front of them."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from raytune_ds.sweep.attempt import END_S
from raytune_ds.sweep.course import Course
from raytune_ds.sweep.records import Goal
from raytune_ds.sweep.search import domain
from raytune_ds.sweep.space import Space, label, mutable
from raytune_ds.sweep.trainable import TIME, report_of
from raytune_ds.sweepconfig import SweepConfig

_GONE = (TuneTrial.TERMINATED, TuneTrial.ERROR)

Build = Callable[[SweepConfig, Goal, Space], TrialScheduler]


def _common(goal: Goal) -> dict[str, Any]:
    return {"time_attr": TIME, "metric": goal.metrics[0], "mode": goal.modes[0]}


def _asha(config: SweepConfig, goal: Goal, space: Space) -> TrialScheduler:
    return AsyncHyperBandScheduler(
        **_common(goal),
        max_t=max(config.reports, config.scheduler.grace_period),
        grace_period=config.scheduler.grace_period,
        reduction_factor=config.scheduler.reduction_factor,
    )


class Hyperband(HyperBandScheduler):
    """Ray Tune's, which looks at a bracket again when one of its trials is gone, not only in its first round."""

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        action = super()._process_bracket(tune_controller, bracket)
        bracket.is_being_processed = False
        return str(action)


def _hyperband(config: SweepConfig, goal: Goal, space: Space) -> TrialScheduler:
    return Hyperband(
        **_common(goal), max_t=config.reports, reduction_factor=config.scheduler.reduction_factor
    )


class Median(MedianStoppingRule):
    """Ray Tune's, which may be overruled: after a crash trials report in another order, and what went on goes on."""

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """See TrialScheduler."""
        self._stopped_trials.discard(trial)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _on_insufficient_samples(self, tune_controller: Any, trial: TuneTrial, time: float) -> str:
        # Ray Tune's gives way to trials that have not begun: the leader's workers would be torn down for them.
        return str(TrialScheduler.CONTINUE)


def _median(config: SweepConfig, goal: Goal, space: Space) -> TrialScheduler:
    return Median(**_common(goal), grace_period=config.scheduler.grace_period)


class Pbt(PopulationBasedTraining):
    """Ray Tune's, which does not wait for those that are gone."""

    def release(self, tune_controller: Any, waiting: list[TuneTrial]) -> None:
        """Those that wait go on; Ray Tune looks whether all have come only when one of them reports."""
        self._next_perturbation_sync += self._perturbation_interval


class Pb2(PB2):
    """Ray Tune's, which does not wait for those that are gone."""

    release = Pbt.release


@runtime_checkable
class _Waiting(Protocol):
    """A scheduler whose trials wait for each other."""

    def release(self, tune_controller: Any, waiting: list[TuneTrial]) -> None:
        """Lets those go on that wait for nobody any more."""


def _pbt(config: SweepConfig, goal: Goal, space: Space) -> TrialScheduler:
    searched = mutable(space, "pbt")
    # A list of choices is walked along; a domain of them would be taken for a range.
    mutations = {d.key: [label(v) for v in d.values] if d.verb == "choice" else domain(d) for d in searched}
    ranges = {d.key: d.values[:2] for d in searched if d.verb != "choice"}

    def within(config: dict[str, Any]) -> dict[str, Any]:
        values = config["values"]
        for key, (low, high) in ranges.items():
            values[key] = min(max(values[key], low), high)
        return config

    return Pbt(
        **_common(goal),
        perturbation_interval=config.scheduler.perturbation_interval,
        quantile_fraction=config.scheduler.quantile_fraction,
        hyperparam_mutations={"values": mutations},
        custom_explore_fn=within,
        log_config=False,
        synch=True,
    )


def _pb2(config: SweepConfig, goal: Goal, space: Space) -> TrialScheduler:
    return Pb2(
        **_common(goal),
        perturbation_interval=config.scheduler.perturbation_interval,
        quantile_fraction=config.scheduler.quantile_fraction,
        hyperparam_bounds={"values": {d.key: list(d.values[:2]) for d in mutable(space, "pb2")}},
        synch=True,
    )


SCHEDULERS: Mapping[str, Build] = {
    "asha": _asha,
    "hyperband": _hyperband,
    "median": _median,
    "pbt": _pbt,
    "pb2": _pb2,
    "none": lambda config, goal, space: FIFOScheduler(),
}


class Recorded(TrialScheduler):
    """Writes down what a scheduler decides, and decides what is written down already.

    After a crash every trial reports again what it had reported, at once and from its own files, so that a fresh
    scheduler learns all that the old one knew.
    """

    def __init__(self, inner: TrialScheduler, course: Course) -> None:
        """`inner` is fresh."""
        super().__init__()
        self._inner, self._course = inner, course
        self._told: set[tuple[int, int, str]] = set()
        self._dropped: set[int] = set()

    @property
    def metric(self) -> Any:
        """See TrialScheduler."""
        return self._inner.metric

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """See TrialScheduler."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A trial is new, or is tried again."""
        self._course.add(trial)
        with _seeded(f"{self._course.seed}/{trial.config['trial']}"):
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """A report: whether its trial goes on."""
        course, number = self._course, trial.config["trial"]
        report = report_of(result)
        assert report is not None
        key = (number, report.number, result["run"])
        if key in self._told:
            return TrialScheduler.CONTINUE  # of an actor that died since, and began again
        self._told.add(key)
        known = course.known_decision(number, report, result["run"])
        reason = course.reason_to_stop(report, course.is_new(number, report, result["run"]))
        if reason is None:
            # The one of a population that comes last changes all of it, whoever it is.
            who = "all" if course.is_population else number
            with _seeded(f"{course.seed}/{who}/{report.number}"):
                decision = self._inner.on_trial_result(tune_controller, trial, result)
            decision = known or decision
            reason = f"by {course.config.scheduler.kind} at report {report.number}"
        else:
            decision = TrialScheduler.STOP
            self._dropped.add(number)
        # A trial that copies another one's config is still the trial it was.
        for each in tune_controller.get_trials():
            course.name(each)
        course.report(trial, report, decision, result)
        if decision == TrialScheduler.STOP:
            course.end(number, "stopped", reason)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """A trial made its last report, or failed, or was ended from elsewhere."""
        course, number = self._course, trial.config["trial"]
        report, error = report_of(result), result.get("error")
        if result.get("ended") and report is not None:
            course.report(trial, report, "END", result)
        if error is not None:
            self._inner.on_trial_error(tune_controller, trial)
        elif number in self._dropped or report is None or course.what_it_lacks(report):
            # Of what it can't compare it does not hear.
            self._inner.on_trial_remove(tune_controller, trial)
        else:
            self._inner.on_trial_complete(tune_controller, trial, result)
        if not result.get("ended"):
            course.end(number, "stopped", f"by {course.config.scheduler.kind}")
        else:
            course.end(number, "failed" if error is not None else "finished", error)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A trial that was waiting is not gone on with."""
        self._inner.on_trial_remove(tune_controller, trial)
        self._course.end(trial.config["trial"], "stopped", f"by {self._course.config.scheduler.kind}")

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A trial's actor died; it may be tried again."""
        self._inner.on_trial_error(tune_controller, trial)
        # Nobody waits for it; where it is tried again, Ray Tune puts it back.
        tune_controller.get_live_trials().discard(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """The next one, even where a scheduler waits for trials that are gone: then those that wait go on, or end."""
        chosen = self._inner.choose_trial_to_run(tune_controller)
        if chosen is not None:
            return chosen
        there = [t for t in tune_controller.get_trials() if t.status not in _GONE]
        if not there or any(t.status != TuneTrial.PAUSED or t.is_saving for t in there):
            return None
        if self._course.is_over:
            for trial in there:
                tune_controller.stop_trial(trial)
            return None
        if isinstance(self._inner, _Waiting):
            self._inner.release(tune_controller, there)
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """See TrialScheduler."""
        return str(self._inner.debug_string())


class Endings(tune.Callback):
    """Hears of trials whose actor died more often than it may, and waits for those that end in good order."""

    def __init__(self, course: Course) -> None:
        """Tells the course."""
        self._course = course

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """See Callback. Ray Tune itself gives the last actors ten seconds."""
        actor = trial.temporary_state.ray_actor
        if actor is not None and trial.status == TuneTrial.RUNNING:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(actor.cleanup.remote(), timeout=END_S)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """See Callback."""
        error = trial.get_pickled_error() or trial.get_error()
        lines = str(error).strip().splitlines() or ["its process died"]
        self._course.end(trial.config["trial"], "failed", lines[-1])


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Schedulers roll the dice of the whole process: here they fall the same each time, and others' are left alone."""
    state, states = random.getstate(), np.random.get_state()
    seed = zlib.crc32(text.encode())
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(states)
