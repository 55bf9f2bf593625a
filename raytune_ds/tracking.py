"""Metrics to metrics.jsonl, always, and to the trackers of `tracking.to`; rank 0 only.

A tracker that fails at the start stops the run, because its owner wants its curves. One that fails later never does:
hours of training are worth more.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytune_ds import storage
from raytune_ds.errors import UserError
from raytune_ds.rundir import MetricsFile, RunDir

EXPERIMENT = "raytune_ds"
"""The MLflow experiment of all runs."""


@dataclass(frozen=True)
class Group:
    """What a run belongs to: the trials of a sweep are one group.

    Attributes:
        path: of the group's directory.
        values: the settings in which the run differs from others of the group, by dotted keys.
    """

    path: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the group."""
        return self.path.rpartition("/")[2]


class Tracker(Protocol):
    """Where curves go."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of one optimizer step or evaluation."""

    def flush(self) -> None:
        """Makes what was logged visible to others, where that takes an effort; called at every checkpoint."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in the run directory; an object store gets them at every checkpoint."""

    def __init__(self, run: RunDir, config: dict[str, Any], last_step: int, group: Group | None) -> None:
        """Opens the event file, and hides what an earlier attempt wrote of later steps."""
        from torch.utils.tensorboard import SummaryWriter

        self._target = run.tensorboard
        self._local = storage.absolute(run.tensorboard) if storage.is_local(run.path) else tempfile.mkdtemp()
        self._writer = SummaryWriter(self._local, purge_step=last_step + 1)
        if group is not None:
            self._add_to_table(group.values)

    def _add_to_table(self, values: Mapping[str, Any]) -> None:
        """Writes a row of the HPARAMS table, also in a run that goes on: its first attempt may never have flushed."""
        from torch.utils.tensorboard.summary import hparams

        experiment, start, _ = hparams(
            {key: _cell(value) for key, value in values.items()}, dict.fromkeys(("eval_loss", "loss"), 0.0)
        )
        file = self._writer.file_writer
        assert file is not None
        for summary in (experiment, start):
            file.add_summary(summary)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """See Tracker."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See Tracker."""
        self._writer.flush()
        if not storage.is_local(self._target):
            storage.upload_dir(Path(self._local), self._target)

    def close(self) -> None:
        """See Tracker."""
        self.flush()
        self._writer.close()


class MLflow:
    """An MLflow run, at the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: RunDir, config: dict[str, Any], last_step: int, group: Group | None) -> None:
        """Starts, or after a restart goes on with, the MLflow run of this run's name; below that of its group."""
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(EXPERIMENT)
        known = _mlflow_run(run.path)
        if known is not None:
            mlflow.start_run(run_id=known)
            return
        parent = _mlflow_run(group.path) if group is not None else None
        tags = {"run_path": run.path} | ({"mlflow.parentRunId": parent} if parent is not None else {})
        mlflow.start_run(run_name=run.name, tags=tags)
        mlflow.log_params(_flat(config))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """See Tracker."""
        self._mlflow.log_metrics(metrics, step=step)

    def flush(self) -> None:
        """See Tracker."""

    def close(self) -> None:
        """See Tracker."""
        self._mlflow.end_run()


class WandB:
    """A Weights & Biases run; its key comes from WANDB_API_KEY."""

    def __init__(self, run: RunDir, config: dict[str, Any], last_step: int, group: Group | None) -> None:
        """Starts, or after a restart goes on with, the run of this run's name."""
        import wandb

        name = _name(run, config)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raytune_ds"),
            name=name,
            id=name,
            resume="allow",
            config=config,
            **({"group": group.name, "job_type": "trial"} if group is not None else {}),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """See Tracker."""
        self._run.log(metrics, step=step)

    def flush(self) -> None:
        """See Tracker."""

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


TRACKERS: dict[str, Callable[[RunDir, dict[str, Any], int, Group | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


class Tracking:
    """All of a run's metrics, whoever reads them."""

    def __init__(
        self,
        run: RunDir,
        to: Sequence[str],
        config: dict[str, Any],
        last_step: int,
        warn: Callable[[str], None],
        group: Group | None = None,
    ) -> None:
        """Opens everything.

        Args:
            run: whose metrics they are.
            to: names of trackers.
            config: the resolved config, for trackers that show it.
            last_step: the step that the run goes on from; metrics of later ones are dropped.
            warn: hears of a tracker that fails later.
            group: that the run belongs to.

        Raises:
            UserError: a tracker can't start.
        """
        self._run, self._warn = run, warn
        self._file = MetricsFile(run, last_step, warn)
        self._trackers = {name: _start(name, run, config, last_step, group) for name in to}

    def log(self, row: dict[str, Any], plot: bool = True) -> None:
        """One row of metrics.jsonl; `plot` sends it to the trackers too."""
        self._file.write(row)
        if plot:
            metrics = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            self._each(lambda tracker: tracker.log(row["step"], metrics))

    def rewind(self, last_step: int) -> None:
        """Drops the lines of steps after `last_step` from metrics.jsonl; in curves they are drawn over.

        Raises:
            OSError: the file can't be written anew.
        """
        self._file.close()
        self._file = MetricsFile(self._run, last_step, self._warn)

    def flush(self) -> None:
        """Makes all so far visible to others, where that takes an effort."""
        self._file.flush()
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever a tracker's library raises, training goes on
                self._warn(f"tracking.to: {name} failed and is switched off for this run: {error}")
                del self._trackers[name]


def _start(name: str, run: RunDir, config: dict[str, Any], last_step: int, group: Group | None) -> Tracker:
    try:
        return TRACKERS[name](run, config, last_step, group)
    except ImportError as error:
        raise UserError(
            f"tracking.to: {name} is not installed ({error}); pip install 'raytune_ds[track]'"
        ) from error
    except Exception as error:  # each tracker's library has its own
        raise UserError(f"tracking.to: {name} could not be started: {error}") from error


# -------------------------------------------------------------------------------------- a group as a whole


@contextmanager
def grouped(
    path: str, to: Sequence[str], config: dict[str, Any], files: Sequence[str], warn: Callable[[str], None]
) -> Iterator[None]:
    """Shows a group in the trackers that don't gather its runs by themselves: in MLflow they have a parent run.

    It is made before what is within, so that runs that start at once find one, and ends with it. A tracker that fails
    here stops nothing.

    Args:
        path: of the group's directory.
        to: names of trackers.
        config: that the runs are made from.
        files: text files that are there at the end, to be shown with the group.
        warn: hears of a tracker that fails.
    """
    parent = None
    if "mlflow" in to:
        with _excused(warn):
            parent = _Parent(path, config)
    ending = "FAILED"
    try:
        yield
        ending = "FINISHED"
    except KeyboardInterrupt:
        ending = "KILLED"
        raise
    finally:
        if parent is not None:
            if ending == "FINISHED":
                with _excused(warn):
                    parent.attach(files)
            with _excused(warn):
                parent.end(ending)


@contextmanager
def _excused(warn: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever MLflow raises, what the runs have found out is worth more
        warn(f"tracking.to: mlflow can't show the runs as one: {error}")


class _Parent:
    """The MLflow run that those of a group are below. The active run of this process is left alone."""

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        """Makes it, or goes on with it."""
        import mlflow

        experiment = mlflow.set_experiment(EXPERIMENT).experiment_id
        self._client = mlflow.MlflowClient()
        known = _mlflow_run(path)
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = path.rpartition("/")[2]
        self._id = self._client.create_run(experiment, run_name=name, tags={"run_path": path}).info.run_id
        params = [mlflow.entities.Param(key, str(value)) for key, value in _flat(config).items()]
        self._client.log_batch(self._id, params=params)

    def attach(self, files: Sequence[str]) -> None:
        """Copies text files to it."""
        for file in files:
            self._client.log_text(self._id, storage.read_bytes(file).decode(), file.rpartition("/")[2])

    def end(self, status: str) -> None:
        """Says how it ended."""
        self._client.set_terminated(self._id, status=status)


def _mlflow_run(path: str) -> str | None:
    """The id of the MLflow run of a directory; None if there is none."""
    import mlflow

    known = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=f"tags.run_path = '{path}'",
        output_format="list",
    )
    return known[0].info.run_id if known else None


# ------------------------------------------------------------------------------------ what trackers are told


def _name(run: RunDir, config: dict[str, Any]) -> str:
    """A name that no other run has; the directories of a sweep's runs have the same ones as another sweep's."""
    return config.get("run", {}).get("name") or run.name


def _cell(value: Any) -> float | str:
    """A value as TensorBoard's table takes it."""
    is_plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
