"""One trial under way in this process: its reports, one after another, whoever asks for them.

A report is only asked for when the one before has been judged, and training waits meanwhile. What the run reported in
an earlier life comes first, from its own files.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ray.train import TrainingFailedError

from raytune_ds import checkpoint, cluster
from raytune_ds.check import Checked, vary
from raytune_ds.compose import replaced
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.launch import Result, assign, train
from raytune_ds.rundir import RunDir
from raytune_ds.sweep.fork import fork
from raytune_ds.sweep.records import Report
from raytune_ds.sweep.reports import Reports
from raytune_ds.sweep.space import Space, Values
from raytune_ds.sweep.sweepdir import SweepDir
from raytune_ds.tracking import Group
from raytune_ds.worker import Assignment

END_S = 120.0
"""How long a run that is told to end may take: its ranks wait at a report, and have little left to do."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint of a run that a trial is begun from.

    Attributes:
        trial: whose it is.
        run: its run directory.
        step: of the checkpoint.
    """

    trial: int
    run: str
    step: int

    @property
    def name(self) -> str:
        """In the name of a run directory."""
        return f"{self.trial:04d}-step-{self.step}"


@dataclass(frozen=True)
class Ended:
    """A trial that makes no more reports.

    Attributes:
        report: the last one; None if it made none.
        error: why it failed; None if it did not.
    """

    report: Report | None
    error: str | None = None


class Attempt:
    """A trial's run, in a thread."""

    def __init__(
        self,
        base: Checked,
        space: Space,
        sweep: SweepDir,
        number: int,
        values: Values,
        origin: Origin | None,
        known_error: str | None,
        progress: Callable[[dict[str, Any]], None],
    ) -> None:
        """Nothing happens before the first report is asked for.

        Args:
            base: the sweep's config, checked, with the settings of all trials.
            space: that is searched.
            sweep: its directory.
            number: of the trial.
            values: of the searched keys.
            origin: what it goes on from, if that is not its own.
            known_error: why it failed when it was run; it is not run again.
            progress: hears of each step.
        """
        self._base, self._space, self._sweep, self._values = base, space, sweep, values
        self._origin, self._known_error, self._progress = origin, known_error, progress
        self._forks = origin is not None and origin.trial != number
        if origin is None:
            self.run = sweep.trial(number)
        else:
            self.run = sweep.trial(number, origin.name) if self._forks else RunDir(origin.run)
        self._reports = self._all_reports()
        self._watcher: _Watcher | None = None

    def next(self) -> Report | Ended:
        """The next report, or how the trial ended; the one before is hereby judged good enough to train on.

        Raises:
            Exception: what is nobody's fault but ours.
        """
        return next(self._reports)

    def end(self) -> None:
        """Ends the run, at the report it waits at if it does; its newest checkpoint stays."""
        if self._watcher is not None:
            self._watcher.end()

    def _all_reports(self) -> Iterator[Report | Ended]:
        last: Report | None = None
        if self._known_error is not None and not checkpoint.steps(self.run.checkpoints):
            yield Ended(None, self._known_error)
            return
        try:
            assignment = self._assignment()
            if self._forks and self._origin:
                fork(RunDir(self._origin.run), self._origin.step, self.run, assignment.identity)
            reports = Reports(
                assignment.plan.total_steps, assignment.plan.eval_every, assignment.base.trainable
            )
            for last in self._known(reports):
                if last.step < last.total_steps:
                    yield last
            if self._known_error is not None:
                yield Ended(last, self._known_error)
                return
            scale = cluster.plan_scale(assignment.config.scaling, assignment.config.train.global_batch)
            self._watcher = watcher = _Watcher(reports, self._progress)
            for last in watcher.follow(lambda: train(assignment, scale, time.monotonic(), watcher)):
                if last.step < last.total_steps:
                    yield last
        except UserError as error:
            yield Ended(last, str(error))
        except TrainingFailedError as error:
            yield Ended(last, _reason(error))
        else:
            yield Ended(last)

    def _assignment(self) -> Assignment:
        """What its workers are told.

        Raises:
            UserError: the values don't go together, or the data can't be prepared.
        """
        config = self._space.applied(self._base.config, self._values)
        config = replaced(config, run={"name": f"{self._sweep.name}-{self.run.name}"[-128:].lstrip(".")})
        assignment = assign(vary(self._base, config), self.run, self._lineage())
        return replace(
            assignment,
            config=_with_reports(config, assignment.plan.total_steps),
            group=Group(self._sweep.path, self._space.complete(self._base.config, self._values)),
        )

    def _lineage(self) -> str:
        text = f"a trial of the sweep {self._sweep.name}: {self.run.name}"
        if self._forks and self._origin:
            text += f", begun from trial {self._origin.trial:04d} as it was at step {self._origin.step}"
        return text

    def _known(self, reports: Reports) -> Iterator[Report]:
        """What the run reported up to its newest checkpoint, and after the one it was begun from."""
        manifest = checkpoint.newest_complete(self.run.checkpoints)
        if manifest is None:
            return
        first = self._origin.step if self._origin else 0
        for row in self.run.read_metrics():
            if row["step"] > manifest.step:
                break
            report = reports.feed(row)
            if report is not None and report.step > first:
                yield report


def _with_reports(config: Config, total_steps: int) -> Config:
    """Evaluates as often as trials report, and has a checkpoint of each report for as long as others may copy it.

    A trial whose settings let it diverge is no mistake: scheduler and leaderboard judge it by its losses.
    """
    every = config.train.eval_steps or max(1, -(-total_steps // config.sweep.reports))
    keep = max(config.checkpoint.keep, config.sweep.scheduler.perturbation_interval + 1)
    train: dict[str, Any] = {"eval_steps": every}
    if config.train.on_skipped_steps == "stop":
        train["max_skipped_steps"] = total_steps + 1
    return replaced(config, train=train, checkpoint={"every_steps": every, "keep": keep})


def _reason(error: TrainingFailedError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class _Watcher:
    """Hands the reports of a run that trains in a thread to the thread that asks for them."""

    judges = True

    def __init__(self, reports: Reports, progress: Callable[[dict[str, Any]], None]) -> None:
        self._reports, self._progress = reports, progress
        self._items: queue.Queue[Report | Result | BaseException] = queue.Queue()
        self._verdicts: queue.Queue[bool] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], None] | None = None
        self._waits = False
        self._report: Report | None = None
        self._asked = 0  # the number of the newest report that was asked about

    def follow(self, run: Callable[[], Result]) -> Iterator[Report]:
        """The reports of a run, which goes on when the next one is asked for.

        Raises:
            Exception: that of the run.
        """
        self._thread = threading.Thread(target=self._guarded, args=(run,), daemon=True)
        self._thread.start()
        while True:
            item = self._items.get()
            if isinstance(item, Result):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.step < item.total_steps:
                self._verdicts.put(True)

    def end(self) -> None:
        """Ends the run."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._verdicts.put(False)
        if not self._waits and self._stop is not None:
            self._stop()
        self._thread.join(END_S)

    def _guarded(self, run: Callable[[], Result]) -> None:
        try:
            self._items.put(run())
        except BaseException as error:
            self._items.put(error)

    # ------------------------------------------------------------------------ see launch.Watcher

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def begins(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def show(self, kind: str, content: dict[str, Any]) -> None:
        if kind in ("step", "eval"):
            report = self._reports.feed(content)
            if report is not None:
                self._report = report
                if report.step == report.total_steps:
                    self._items.put(report)
        if kind in ("start", "step"):
            self._progress(content)

    def goes_on(self, step: int) -> bool:
        report = self._report
        # The model as it was before training; the end; a step that came again after workers were restarted.
        if (
            report is None
            or report.step != step
            or step == report.total_steps
            or report.number <= self._asked
        ):
            return True
        self._asked = report.number
        self._waits = True
        self._items.put(report)
        verdict = self._verdicts.get()
        self._waits = False
        return verdict
