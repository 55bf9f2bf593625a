"""Metrics to metrics.jsonl, always, and to the trackers of `tracking.to`; rank 0 only.

A tracker that fails at the start stops the run, because its owner wants its curves. One that fails later never does:
hours of training are worth more.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from raytune_ds import storage
from raytune_ds.errors import UserError
from raytune_ds.rundir import MetricsFile, RunDir


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

    def __init__(self, run: RunDir, config: dict[str, Any], last_step: int) -> None:
        """Opens the event file, and hides what an earlier attempt wrote of later steps."""
        from torch.utils.tensorboard import SummaryWriter

        self._target = run.tensorboard
        self._local = storage.absolute(run.tensorboard) if storage.is_local(run.path) else tempfile.mkdtemp()
        self._writer = SummaryWriter(self._local, purge_step=last_step + 1)

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

    def __init__(self, run: RunDir, config: dict[str, Any], last_step: int) -> None:
        """Starts, or after a restart goes on with, the MLflow run of this run's name."""
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment("raytune_ds")
        known = mlflow.search_runs(
            experiment_names=["raytune_ds"],
            filter_string=f"tags.run_path = '{run.path}'",
            output_format="list",
        )
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.name, tags={"run_path": run.path})
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

    def __init__(self, run: RunDir, config: dict[str, Any], last_step: int) -> None:
        """Starts, or after a restart goes on with, the run of this run's name."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raytune_ds"),
            name=run.name,
            id=run.name,
            resume="allow",
            config=config,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """See Tracker."""
        self._run.log(metrics, step=step)

    def flush(self) -> None:
        """See Tracker."""

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


TRACKERS: dict[str, Callable[[RunDir, dict[str, Any], int], Tracker]] = {
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
    ) -> None:
        """Opens everything.

        Args:
            run: whose metrics they are.
            to: names of trackers.
            config: the resolved config, for trackers that show it.
            last_step: the step that the run goes on from; metrics of later ones are dropped.
            warn: hears of a tracker that fails later.

        Raises:
            UserError: a tracker can't start.
        """
        self._warn = warn
        self._file = MetricsFile(run, last_step, warn)
        self._trackers = {name: _start(name, run, config, last_step) for name in to}

    def log(self, row: dict[str, Any], plot: bool = True) -> None:
        """One row of metrics.jsonl; `plot` sends it to the trackers too."""
        self._file.write(row)
        if plot:
            metrics = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            self._each(lambda tracker: tracker.log(row["step"], metrics))

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


def _start(name: str, run: RunDir, config: dict[str, Any], last_step: int) -> Tracker:
    try:
        return TRACKERS[name](run, config, last_step)
    except ImportError as error:
        raise UserError(
            f"tracking.to: {name} is not installed ({error}); pip install 'raytune_ds[track]'"
        ) from error
    except Exception as error:  # each tracker's library has its own
        raise UserError(f"tracking.to: {name} could not be started: {error}") from error


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
