"""Trackers: curves where they are wanted, and no run that ends because of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ds import tracking
from raytune_ds.errors import UserError
from raytune_ds.rundir import RunDir
from raytune_ds.tracking import Tracking


def opened(run: RunDir, to: tuple[str, ...], warnings: list[str], last_step: int = -1) -> Tracking:
    return Tracking(run, to, {}, last_step, warnings.append)


def curve(folder: Path) -> list[tuple[int, float]]:
    """The loss as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_an_object_store_has_the_curves_up_to_the_last_flush(bucket: str, tmp_path: Path) -> None:
    """A worker that is killed closes nothing; the next one goes on with the same curves."""
    run, warnings = RunDir(f"{bucket}/one"), list[str]()
    killed = opened(run, ("tensorboard",), warnings)
    for step in (1, 2):
        killed.log({"step": step, "loss": 1.0 / step})
    killed.flush()
    killed.log({"step": 3, "loss": 9.0})
    folder = tmp_path / "bucket/runs/one/tensorboard"
    assert curve(folder) == [(1, 1.0), (2, 0.5)]
    resumed = opened(run, ("tensorboard",), warnings, last_step=2)
    resumed.log({"step": 3, "loss": 0.25})
    resumed.close()
    assert curve(folder) == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert warnings == []


class Broken:
    """Starts, and then fails in one way."""

    def __init__(self, fails: str) -> None:
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        def act(*_: Any) -> None:
            if name == self._fails:
                raise ConnectionError("the server is gone")

        return act


@pytest.mark.parametrize("fails", ["log", "flush", "close"])
def test_a_tracker_that_fails_later_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda *_: Broken(fails))
    run, warnings = RunDir(str(tmp_path)), list[str]()
    made = opened(run, ("wandb",), warnings)
    for step in (1, 2):
        made.log({"step": step, "loss": 1.0})
        made.flush()
    made.close()
    assert len(warnings) == 1
    assert "wandb failed and is switched off" in warnings[0]
    assert [row["step"] for row in run.read_metrics()] == [1, 2]


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ConnectionError("no server")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", refuse)
    with pytest.raises(UserError, match="mlflow could not be started: no server"):
        opened(RunDir(str(tmp_path)), ("mlflow",), [])
