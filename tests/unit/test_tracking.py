"""Trackers: curves where they are wanted, and no run that ends because of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ds import tracking, worker
from raytune_ds.compose import replaced
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.rundir import RunDir
from raytune_ds.sweep import attempt
from raytune_ds.sweep.space import Space
from raytune_ds.sweep.sweepdir import SweepDir
from raytune_ds.tracking import Group, Tracking, grouped

VALUES = {"train.learning_rate": 3e-4, "adapter.r": 8, "adapter.targets": ["q", "o"], "adapter.rslora": True}


def opened(
    run: RunDir, to: tuple[str, ...], warnings: list[str], last_step: int = -1, group: Group | None = None
) -> Tracking:
    return Tracking(run, to, {}, last_step, warnings.append, group)


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


# -------------------------------------------------------------------------------------------------- groups


def trial(sweep: str, number: int, values: dict[str, Any] = VALUES) -> tuple[RunDir, Group]:
    return RunDir(f"{sweep}/trials/{number:04d}"), Group(sweep, values)


def table(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, tuple[int, float]]]]:
    """The HPARAMS table as TensorBoard makes it of a folder: by run, the settings, and each metric's newest value."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = EventMultiplexer()
    events.AddRunsFromDirectory(str(folder))
    events.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(events, str(folder))))
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS]
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=statuses, slice_size=9)
    rows = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    return {
        row.name: (
            {key: getattr(value, value.WhichOneof("kind")) for key, value in row.hparams.items()},
            {metric.name.tag: (metric.training_step, metric.value) for metric in row.metric_values},
        )
        for row in rows
    }


def test_tensorboard_shows_a_group_as_a_table_and_each_trial_once_after_a_restart(tmp_path: Path) -> None:
    sweep, warnings = str(tmp_path / "sweep"), list[str]()
    for number in (1, 2):  # of the same settings
        run, group = trial(sweep, number)
        killed = opened(run, ("tensorboard",), warnings, group=group)
        for step in (1, 2):
            killed.log({"step": step, "loss": 4.0 / step / number, "tokens_per_s": 9.0})
        killed.log({"step": 2, "eval_loss": 0.5})
        killed.flush()
    run, group = trial(sweep, 1)
    resumed = opened(run, ("tensorboard",), warnings, last_step=1, group=group)
    resumed.log({"step": 2, "loss": 1.5})
    resumed.close()
    shown = {
        "train.learning_rate": 3e-4,
        "adapter.r": 8.0,
        "adapter.targets": '["q", "o"]',
        "adapter.rslora": "true",
    }
    assert table(tmp_path / "sweep") == {
        "trials/0001/tensorboard": (shown, {"loss": (2, 1.5)}),
        "trials/0002/tensorboard": (shown, {"loss": (2, 1.0), "eval_loss": (2, 0.5)}),
    }
    assert curve(Path(run.tensorboard)) == [(1, 4.0), (2, 1.5)]
    assert warnings == []


def test_a_trial_whose_first_attempt_left_nothing_is_in_the_table(bucket: str, tmp_path: Path) -> None:
    run, group = trial(f"{bucket}/sweep", 1)
    opened(run, ("tensorboard",), [], group=group)
    for _ in range(2):
        resumed = opened(run, ("tensorboard",), [], group=group)
        resumed.log({"step": 1, "loss": 2.0})
        resumed.close()
    rows = table(tmp_path / "bucket/runs/sweep")
    assert list(rows) == ["trials/0001/tensorboard"]
    assert rows["trials/0001/tensorboard"][1] == {"loss": (1, 2.0)}


def test_a_plain_run_has_no_table(tmp_path: Path) -> None:
    made = opened(RunDir(str(tmp_path / "run")), ("tensorboard",), [])
    made.log({"step": 1, "loss": 1.0})
    made.close()
    assert table(tmp_path) == {}


@dataclass(frozen=True)
class FakeAssignment:
    """What a trial adds to."""

    config: Config
    run: RunDir
    group: Group | None = None

    @property
    def plan(self) -> Any:
        return SimpleNamespace(total_steps=10)


def test_a_trial_hands_its_values_and_those_that_follow_from_them_to_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, config = SweepDir(str(tmp_path / "sweep")), Config()
    monkeypatch.setattr(attempt, "vary", lambda base, config: config)
    monkeypatch.setattr(attempt, "assign", lambda config, run, lineage: FakeAssignment(config, run))
    values = {"adapter.r": 8, "train.learning_rate": 1e-3, "adapter.dropout": 0.1}
    base: Any = SimpleNamespace(config=config)
    begun = attempt.Attempt(base, Space.of(config), sweep, 1, values, None, None, {}, lambda _: None)
    assignment = begun._assignment()
    main: Any = SimpleNamespace(is_main=True)
    opened = worker._open_tracking(assignment, main, None, lambda kind, _: pytest.fail(kind))
    assert opened is not None
    opened.close()
    [(shown, _)] = table(Path(sweep.path)).values()
    assert shown == {**values, "adapter.alpha": 16}
    assert assignment.group == Group(sweep.path, {**values, "adapter.alpha": 16})


class FakeWandB:
    """In place of the module."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []

    def init(self, **settings: Any) -> Any:
        self.begun.append(settings)
        return SimpleNamespace(finish=lambda: None)


def test_wandb_groups_trials_under_names_that_other_sweeps_do_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for sweep in ("one", "two"):
        run, group = trial(str(tmp_path / sweep), 1)
        config = {"run": {"name": f"{sweep}-0001"}, "train": {"learning_rate": 3e-4}}
        Tracking(run, ("wandb",), config, -1, pytest.fail, group).close()
    Tracking(RunDir(str(tmp_path / "plain")), ("wandb",), {"run": {"name": None}}, -1, pytest.fail).close()
    assert [(s["id"], s.get("group"), s.get("job_type")) for s in fake.begun] == [
        ("one-0001", "one", "trial"),
        ("two-0001", "two", "trial"),
        ("plain", None, None),
    ]
    assert fake.begun[0]["config"]["train"]["learning_rate"] == 3e-4


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The real one, with a store of its own."""
    module = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # artifacts lie in the working directory
    before = module.get_tracking_uri()
    module.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield module
    module.end_run()
    module.set_tracking_uri(before)


def mlflow_runs(mlflow: Any) -> dict[str, Any]:
    """By name."""
    runs = mlflow.search_runs(experiment_names=[tracking.EXPERIMENT], output_format="list")
    return {run.info.run_name: run for run in runs}


def test_mlflow_nests_trials_under_one_run_that_has_the_files_of_the_sweep(
    mlflow: Any, tmp_path: Path
) -> None:
    sweep, board = str(tmp_path / "sweep"), tmp_path / "sweep/leaderboard.csv"
    config = replaced(Config(), run={"name": "sweep"}).model_dump(mode="json")
    config["sweep"]["space"] = ["x" * 10_000]  # more than MLflow keeps of one
    for loss in (2.0, 1.0):  # begun, and gone on with
        with grouped(sweep, ("mlflow",), config, (str(board),), pytest.fail):
            assert mlflow_runs(mlflow)["sweep"].info.status == "RUNNING"
            for number in (1, 2):
                run, group = trial(sweep, number)
                made = Tracking(run, ("mlflow",), config, -1, pytest.fail, group)
                made.log({"step": 1, "loss": loss})
                made.close()
            board.write_text(f"rank,loss\r\n1,{loss}\r\n", newline="")
    plain = Tracking(RunDir(str(tmp_path / "plain")), ("mlflow",), config, -1, pytest.fail)
    plain.close()
    runs = mlflow_runs(mlflow)
    parent = runs.pop("sweep")
    assert {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()} == {
        "0001": parent.info.run_id,
        "0002": parent.info.run_id,
        "plain": None,
    }
    assert {run.info.status for run in (parent, *runs.values())} == {"FINISHED"}
    assert parent.data.params["train.learning_rate"] == runs["0001"].data.params["train.learning_rate"]
    assert runs["0002"].data.metrics["loss"] == 1.0
    text = mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/leaderboard.csv")
    assert text.split() == ["rank,loss", "1,1.0"]


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("all failed"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_tells_how_a_sweep_ended_that_did_not_come_to_its_end(
    mlflow: Any, tmp_path: Path, error: BaseException, status: str
) -> None:
    with (
        pytest.raises(type(error)),
        grouped(str(tmp_path / "sweep"), ("mlflow",), {}, ("none",), pytest.fail),
    ):
        raise error
    assert mlflow_runs(mlflow)["sweep"].info.status == status


class FakeMLflow:
    """In place of the module; one of its functions fails."""

    def __init__(self, fails: str) -> None:
        self._fails = fails
        self.called: list[str] = []
        self.entities = SimpleNamespace(Param=lambda key, value: (key, value))

    def MlflowClient(self) -> FakeMLflow:
        return self

    def __getattr__(self, name: str) -> Any:
        def act(*_: Any, **__: Any) -> Any:
            self.called.append(name)
            if name == self._fails:
                raise ConnectionError("the server is gone")
            return (
                []
                if name == "search_runs"
                else SimpleNamespace(experiment_id="1", info=SimpleNamespace(run_id="2"))
            )

        return act


@pytest.mark.parametrize("fails", ["set_experiment", "create_run", "log_text", "set_terminated"])
def test_a_group_that_cannot_be_shown_costs_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    fake, warnings = FakeMLflow(fails), list[str]()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    file = tmp_path / "report.html"
    with grouped(str(tmp_path), ("mlflow",), {}, (str(file),), warnings.append):
        file.write_text("<html>")
    assert len(warnings) == 1
    assert "the server is gone" in warnings[0]
    assert ("set_terminated" in fake.called) == (fails in ("log_text", "set_terminated"))


def test_a_group_is_none_of_the_other_trackers_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with grouped(str(tmp_path), ("tensorboard", "wandb"), {}, ("none",), pytest.fail):
        pass
