"""How a sweep stands while it goes on: what its searcher and its scheduler both have to know."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.records import Goal, Report, Status, Trial
from raytune_ds.sweep.space import Space, Values
from raytune_ds.sweepconfig import POPULATION, SweepConfig

STOP, CONTINUE = "STOP", "CONTINUE"
"""Decisions, as Ray Tune writes them."""
PAUSED = ("PAUSE", "NOOP")
_BUDGET = "sweep.budget."


class TrialHandle(Protocol):
    """The part of a Ray Tune trial that is used."""

    trial_id: str
    config: dict[str, Any]


class Listener(Protocol):
    """Hears what happens."""

    def begins(self, trial: Trial) -> None:
        """A trial is new, or is gone on with."""

    def reported(self, trial: Trial, decision: str) -> None:
        """A trial has reported."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended."""


class Course:
    """Keeps the journal, and tells apart what is new from what is only done again after a crash."""

    def __init__(
        self,
        config: Config,
        space: Space,
        goal: Goal,
        journal: Journal,
        listener: Listener,
        most_running: int,
    ) -> None:
        """Of a sweep that begins, or goes on.

        Args:
            config: that the trials are made from, with the settings of all of them.
            space: that is searched.
            goal: of the search.
            journal: of the sweep.
            listener: hears of everything that is new.
            most_running: trials at once.
        """
        self._base, self._space, self._goal = config, space, goal
        self._journal, self._listener, self.most_running = journal, listener, most_running
        self._hours_before, self._begun = journal.hours_before, time.monotonic()
        self._numbers: dict[str, int] = {}
        self._running: set[int] = set()
        self._ended: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune writes all it is given to a file, to restore from; a sweep is restored from its journal.
        return object, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Course:
        return self

    @property
    def config(self) -> SweepConfig:
        """The sweep's section."""
        return self._base.sweep

    @property
    def seed(self) -> int:
        """Of all dice."""
        return self._base.run.seed

    @property
    def has_room(self) -> bool:
        """Whether one more trial may run now; paused ones do not."""
        return len(self._running) < self.most_running

    # ------------------------------------------------------------------------------------ what happens

    def add(self, trial: TrialHandle) -> None:
        """A trial is new to Ray Tune, or is tried again."""
        is_new = trial.trial_id not in self._numbers
        if is_new:
            self._numbers[trial.trial_id] = len(self._numbers) + 1
        number = self.name(trial)
        self._running.add(number)
        if self._journal.find(number) is None:
            self._journal.suggest(number, self._values(trial))
        known = self._journal.trial(number)
        if is_new and known.status == "running":
            self._listener.begins(known)

    def go_on(self) -> None:
        """Trials that a budget stopped go on, if there is more of it now."""
        if self.spent is None:
            for trial in self._journal.trials:
                if trial.status == "stopped" and (trial.reason or "").startswith(_BUDGET):
                    self._journal.again(trial.number)

    def name(self, trial: TrialHandle) -> int:
        """Writes the number of a trial into its config, where its actor finds it; and how it ended, if it has.

        A population's trials are copied from each other: they tell it again from the files of their runs.
        """
        number = self._numbers[trial.trial_id]
        known = self._journal.find(number)
        ended = known is not None and known.status != "running" and not self.is_population
        trial.config |= {"trial": number, "ended": known if ended else None}
        return number

    @property
    def is_population(self) -> bool:
        """Whether trials go on from copies of each other."""
        return self.config.scheduler.kind in POPULATION

    def is_new(self, number: int, report: Report, run: str) -> bool:
        """Whether nothing has been decided at this report yet."""
        return self._journal.decision(number, report.number, run) is None

    def known_decision(self, number: int, report: Report, run: str) -> str | None:
        """What was decided then, if that was to stop or to go on; pauses follow from who else is there.

        Hyperband compares trials once all of a round have reported: it comes to the same in any order of reports, and
        can't do without its pauses.
        """
        decision = self._journal.decision(number, report.number, run)
        reason = self._journal.trial(number).reason or ""
        if self.config.scheduler.kind == "hyperband" and not reason.startswith(_BUDGET):
            return None
        return decision if decision in (STOP, CONTINUE) else None

    def report(self, trial: TrialHandle, report: Report, decision: str, result: Mapping[str, Any]) -> None:
        """A trial has reported, and the scheduler has decided."""
        number, run = trial.config["trial"], result["run"]
        (self._running.discard if decision in PAUSED else self._running.add)(number)
        if self._journal.decision(number, report.number, run) is None:
            self._journal.report(number, report, decision, self._values(trial), run, result.get("origin"))
            self._listener.reported(self._journal.trial(number), decision)

    def end(self, number: int, status: Status, reason: str | None) -> None:
        """A trial has ended."""
        self._running.discard(number)
        if number in self._ended or self._journal.trial(number).status != "running":
            return
        self._ended.add(number)
        self._journal.end(number, status, reason)
        self._listener.ended(self._journal.trial(number))

    def _values(self, trial: TrialHandle) -> Values:
        drawn: Values = trial.config["values"]
        try:
            return self._space.complete(self._base, drawn)
        except UserError:
            return drawn  # a formula that has no value here: the trial will fail with the reason

    # -------------------------------------------------------------------------------------- what to do

    @property
    def is_over(self) -> bool:
        """Whether no more trials are wanted."""
        return self.spent is not None or self.is_hopeless

    def is_done(self, total: int) -> bool:
        """Whether that many trials have ended, or all there will be."""
        trials = self._journal.trials
        return all(t.status != "running" for t in trials) and (len(trials) >= total or self.is_over)

    @property
    def is_hopeless(self) -> bool:
        """Whether so many trials failed, and none succeeded, that more would, too."""
        trials = self._journal.trials
        failed = sum(trial.status == "failed" for trial in trials)
        return failed >= self.config.give_up_after and all(
            trial.last is None or trial.status == "failed" for trial in trials
        )

    @property
    def tokens(self) -> int:
        """Trained on so far, over all trials."""
        return sum(trial.last.tokens for trial in self._journal.trials if trial.last)

    @property
    def hours(self) -> float:
        """Of wall time, over all launches."""
        return self._hours_before + (time.monotonic() - self._begun) / 3600

    @property
    def money(self) -> float | None:
        """What the hours cost; None where the price is not known."""
        price = self.config.budget.price_per_hour
        return None if price is None else self.hours * price

    @property
    def price_per_trial_hour(self) -> float | None:
        """A trial's share of the price; None where that is not known."""
        price = self.config.budget.price_per_hour
        return None if price is None else price / self.most_running

    @property
    def spent(self) -> str | None:
        """Which budget is used up."""
        budget = self.config.budget
        for name, limit, used in (
            ("tokens", budget.tokens, self.tokens),
            ("hours", budget.hours, self.hours),
            ("money", budget.money, self.money),
        ):
            if limit is not None and used is not None and used >= limit:
                return f"{_BUDGET}{name} is used up"
        return None

    def reason_to_stop(self, report: Report, is_new: bool) -> str | None:
        """Why a trial must not go on, whatever its scheduler thinks; what is spent now stops no report of before."""
        return self.what_it_lacks(report) or (self.spent if is_new else None)

    def what_it_lacks(self, report: Report) -> str | None:
        """Why a report can't be compared with others, if it can't."""
        for metric in self._goal.metrics:
            value = report.metrics.get(metric)
            if value is None or not math.isfinite(value):
                return f"its {metric} is not a number"
        return None
