"""A trial, as Ray Tune sees it: an actor without a CPU of its own, whose steps are the reports of a real run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from ray import tune

from raytune_ds.check import Checked
from raytune_ds.cluster import Scale
from raytune_ds.config import ScalingConfig
from raytune_ds.sweep.attempt import Attempt, Ended, Origin
from raytune_ds.sweep.records import Report
from raytune_ds.sweep.space import Space
from raytune_ds.sweep.sweepdir import SweepDir

TIME = "report"
"""The number of a trial's report: what schedulers count time in."""


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep are told.

    Attributes:
        base: the config of all trials, checked.
        space: that is searched.
        sweep: its directory.
        board: an actor that hears of their progress.
        environment: variables of the driver that a trial needs, wherever it runs.
        scales: what trials ask for, by what decides it.
    """

    base: Checked
    space: Space
    sweep: SweepDir
    board: Any
    environment: dict[str, str]
    scales: Mapping[tuple[ScalingConfig, int], Scale]


class TrialActor(tune.Trainable):
    """Config keys: `trial`, its number; `values`, of the searched keys; `ended`, how it ended if it has."""

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """A new trial."""
        if job is not None:
            self._job = job
            os.environ.update(job.environment)
        self._attempt: Attempt | None = None
        self._origin: Origin | None = None
        self._report: Report | None = None

    def step(self) -> dict[str, Any]:
        """Trains to the next report, or to the end."""
        if self._attempt is None:
            self._attempt = self._begun()
        item = self._attempt.next()
        report = item if isinstance(item, Report) else item.report
        self._report = report or self._report
        result: dict[str, Any] = {"run": self._attempt.run.path, "origin": self._attempt.lineage}
        if report is not None:
            result |= {TIME: report.number, "content": asdict(report), **report.metrics}
        if isinstance(item, Ended):
            result |= {"done": True, "ended": True, "error": item.error}
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where the run's own checkpoint of the newest report lies."""
        assert self._attempt is not None
        assert self._report is not None
        attempt, step = self._attempt, self._report.step
        return asdict(Origin(self.config["trial"], attempt.run.path, step, attempt.lineage))

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Goes on from a checkpoint, its own or another trial's."""
        assert checkpoint is not None
        self._origin = Origin(**{field.name: checkpoint[field.name] for field in fields(Origin)})

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial in this process, which has all libraries imported."""
        self.cleanup()
        self.config = new_config
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Ends the run at its report, so that nothing of it is left: no worker, no placement group, no open tracker."""
        if self._attempt is not None:
            self._attempt.end()

    def _begun(self) -> Attempt:
        config, job = self.config, self._job
        return Attempt(
            job.base,
            job.space,
            job.sweep,
            config["trial"],
            config["values"],
            self._origin,
            config["ended"],
            job.scales,
            partial(job.board.note.remote, config["trial"]),
        )


def trainable(job: Job, memory: int) -> Any:
    """What the Tuner runs; its actor asks for so many bytes of memory.

    Ray Tune wants every actor to ask for something: with a share of a CPU, trials would never start on a cluster whose
    CPUs all belong to their workers.
    """
    with_job = tune.with_parameters(TrialActor, job=job)
    return tune.with_resources(with_job, tune.PlacementGroupFactory([{"CPU": 0, "memory": memory}]))


def report_of(result: dict[str, Any]) -> Report | None:
    """The report in a result, as Ray Tune hands it on: nested keys flattened, or not."""
    if "content" in result:
        return Report(**result["content"])
    flat = {
        key.removeprefix("content/"): value for key, value in result.items() if key.startswith("content/")
    }
    if not flat:
        return None
    metrics = {k.removeprefix("metrics/"): v for k, v in flat.items() if k.startswith("metrics/")}
    return Report(**{k: v for k, v in flat.items() if "/" not in k}, metrics=metrics)
