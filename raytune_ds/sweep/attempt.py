"""One trial under way in this process: its reports, one after another, whoever asks for them.

A report is only asked for when the one before has been judged, and training waits meanwhile. What the run reported in
an earlier life comes first, from its own files.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import xxhash
from ray.train import TrainingFailedError

from raytune_ds import catalog, cluster
from raytune_ds.assignment import Assignment
from raytune_ds.catalog import CheckpointError
from raytune_ds.check import Checked, vary
from raytune_ds.compose import replaced
from raytune_ds.config import Config, ScalingConfig
from raytune_ds.errors import UserError
from raytune_ds.launch import Result, assign, train
from raytune_ds.rundir import RunDir
from raytune_ds.startup import Startup
from raytune_ds.sweep.fork import fork
from raytune_ds.sweep.records import Report, Trial, trial_name
from raytune_ds.sweep.reports import Reports
from raytune_ds.sweep.space import Space, Values
from raytune_ds.sweep.sweepdir import SweepDir
from raytune_ds.sweepconfig import POPULATION
from raytune_ds.tracking import Group

END_S = 120.0
"""How long a run that is told to end may take: its ranks wait at a report, and have little left to do."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint of a run that a trial is begun from.

    Attributes:
        trial: whose it is.
        run: its run directory.
        step: of the checkpoint.
        lineage: the checkpoint of another trial that this run began with.
    """

    trial: int
    run: str
    step: int
    lineage: str | None = None

    def name(self, values: Values) -> str:
        """In the name of the run directory of a trial that goes on from it with such values."""
        told = json.dumps(values, sort_keys=True).encode()
        return f"{trial_name(self.trial)}-step-{self.step}-{xxhash.xxh3_64_hexdigest(told)[:6]}"

    def __str__(self) -> str:
        return f"trial {trial_name(self.trial)}, step {self.step}"


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
        ended: Trial | None,
        scales: Mapping[tuple[ScalingConfig, int], cluster.Scale],
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
            ended: how it ended, if it has; it is told again, and not run.
            scales: of the sweep's trials, as they were when it began.
            progress: hears of each step.
        """
        self._base, self._space, self._sweep, self._values = base, space, sweep, values
        self._origin, self._ended, self._scales, self._progress = origin, ended, scales, progress
        self._forks = origin is not None and origin.trial != number
        if origin is None:
            self.run = sweep.trial(number)
        else:
            self.run = sweep.trial(number, origin.name(values)) if self._forks else RunDir(origin.run)
        self.lineage = None if origin is None else str(origin) if self._forks else origin.lineage
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
        if self._ended is not None:
            yield from self._told_again(self._ended)
            return
        last: Report | None = None
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
            self._watcher = watcher = _Watcher(reports, self._progress)
            scale = self._scale(assignment.config)
            for last in watcher.follow(lambda: train(assignment, scale, Startup(time.monotonic()), watcher)):
                if last.step < last.total_steps:
                    yield last
        except (UserError, CheckpointError) as error:
            yield Ended(last, str(error))
        except TrainingFailedError as error:
            yield Ended(last, _reason(error))
        else:
            yield Ended(last)

    def _told_again(self, trial: Trial) -> Iterator[Report | Ended]:
        first = self._origin.step if self._origin else 0
        for report in trial.reports:
            if first < report.step < report.total_steps:
                yield report
        yield Ended(trial.last, trial.reason if trial.status == "failed" else None)

    def _scale(self, config: Config) -> cluster.Scale:
        """What the trial asks for. Nodes that are away just now are no reason to fail: Ray Train waits for them."""
        key = (config.scaling, config.train.global_batch)
        return self._scales.get(key) or cluster.plan_scale(*key)

    def _assignment(self) -> Assignment:
        """What its workers are told.

        Raises:
            UserError: the values don't go together, or the data can't be prepared.
        """
        config = self._space.applied(self._base.config, self._values)
        config = replaced(config, run={"name": f"{self._sweep.name}-{self.run.name}"[-128:].lstrip(".")})
        assignment = assign(vary(self._base, config), self.run, self._lineage_text())
        return replace(
            assignment,
            config=_with_reports(config, assignment.plan.total_steps),
            group=Group(self._sweep.path, self._space.complete(self._base.config, self._values)),
        )

    def _lineage_text(self) -> str:
        text = f"a trial of the sweep {self._sweep.name}: {self.run.name}"
        return f"{text}, begun from {self.lineage}" if self.lineage else text

    def _known(self, reports: Reports) -> Iterator[Report]:
        """What the run reported up to its newest checkpoint, and after the one it was begun from."""
        manifest = catalog.newest_complete(self.run.checkpoints)
        if manifest is None:
            return
        first = self._origin.step if self._origin else 0
        for row in self.run.read_metrics():
            if row["step"] > manifest.step:
                break
            report = reports.feed(row)
            if report is not None and report.step > first:
                yield report


def report_every(config: Config, total_steps: int) -> int:
    """Optimizer steps between two reports of a trial."""
    return config.train.eval_steps or max(1, -(-total_steps // config.sweep.reports))


def _with_reports(config: Config, total_steps: int) -> Config:
    """Evaluates as often as trials report, and has a checkpoint of each report.

    Of a population all are kept: any of them may be copied, also when it is told again after a crash. A trial whose
    settings let it diverge is no mistake: scheduler and leaderboard judge it by its losses.
    """
    every = report_every(config, total_steps)
    is_population = config.sweep.scheduler.kind in POPULATION
    keep = max(config.checkpoint.keep, -(-total_steps // every) if is_population else 0)
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
        self._is_over = False

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
                if item.status == "stopped" and not self._is_over:
                    raise RuntimeError(f"{item.run} ended although nobody had asked it to")
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.step < item.total_steps:
                self._verdicts.put(True)

    def end(self) -> None:
        """Ends the run."""
        self._is_over = True
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

    # ------------------------------------------------------------------------ see fitting.Watcher

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
        if self._is_over:
            return False
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
