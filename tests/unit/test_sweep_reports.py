"""Reports from the rows of a run, and runs that begin with a checkpoint of another one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raytune_ds import catalog, storage
from raytune_ds.catalog import CheckpointError
from raytune_ds.keys import KEYS
from raytune_ds.rundir import RunDir, to_lines
from raytune_ds.sweep.fork import MAY_DIFFER, fork, hindrances
from raytune_ds.sweep.records import Report
from raytune_ds.sweep.reports import Reports
from tests.unit.test_checkpoint import IDENTITY, assert_equal, read_all, save, state

Row = dict[str, Any]


def step(number: int, loss: float | None = 2.0, weight: float = 10.0, tokens: int = 100) -> Row:
    return {"step": number, "loss": loss, "weight": weight, "tokens": tokens, "step_time_s": 0.5}


def evaluation(number: int, loss: float | None = 3.0) -> Row:
    return {"step": number, "eval_loss": loss}


def reported(*rows: Row, every: int = 2, total: int = 5) -> list[Report]:
    reports = Reports(total, every, trainable=77)
    return [report for row in rows if (report := reports.feed(row))]


# ---- reports --------------------------------------------------------------------------------------


def test_each_evaluation_that_was_trained_for_makes_a_report() -> None:
    """The last one has the number that it would have had at its time, whatever the length of the run."""
    rows = [evaluation(0), step(1), step(2), {"step": 2, "checkpoint_wait_s": 9.0}, evaluation(2)]
    rows += [step(3), step(4), evaluation(4, 1.5), step(5), evaluation(5, 1.25)]
    found = reported(*rows)
    assert [(r.number, r.step, r.total_steps, r.tokens, r.seconds) for r in found] == [
        (1, 2, 5, 200, 1.0),
        (2, 4, 5, 400, 2.0),
        (3, 5, 5, 500, 2.5),
    ]
    assert found[1].metrics == {
        "eval_loss": 1.5,
        "loss": 2.0,
        "trainable_parameters": 77,
        "tokens": 400,
        "seconds": 2.0,
        "tokens_per_s": 200.0,
    }


def test_the_loss_is_a_mean_over_tokens_since_the_report_before() -> None:
    """Not over steps; speed, too, is that of late."""
    rows = [
        step(1, 9.0),
        step(2, 9.0),
        evaluation(2),
        step(3, 1.0, weight=30, tokens=300),
        step(4, 2.0),
        evaluation(4),
    ]
    last = reported(*rows)[-1]
    assert last.metrics["loss"] == (1.0 * 30 + 2.0 * 10) / 40
    assert last.metrics["tokens_per_s"] == 400.0
    assert last.tokens == 600


@pytest.mark.parametrize(("rows", "loss"), [
    ([step(1, None), step(2)], None),
    ([step(1, weight=0), step(2, weight=0)], None),
    ([step(1, weight=0), step(2, 4.0)], 4.0),
])  # fmt: skip
def test_a_mean_that_is_not_known_is_none(rows: list[Row], loss: float | None) -> None:
    """A step that was skipped has no loss, one without supervised tokens no weight."""
    assert reported(*rows, evaluation(2))[0].metrics["loss"] == loss


def test_a_held_out_loss_that_is_no_number_is_reported() -> None:
    """Whoever judges has to know."""
    assert reported(step(1), step(2), evaluation(2, None))[0].metrics["eval_loss"] is None
    (found,) = reported(step(1, math.nan), step(2), evaluation(2))
    assert math.isnan(found.metrics["loss"] or 0)


def test_steps_that_come_again_replace_what_they_were() -> None:
    """Workers that died went back to a checkpoint; nothing is counted twice, and steps ahead of it do not count yet."""
    life = [step(1), step(2), evaluation(2)]
    lost = [step(3, 50.0, tokens=999), step(4, 50.0), step(5, 50.0)]
    again = [step(3), step(4), evaluation(4)]
    assert reported(*life, *lost, *again) == reported(*life, *again)
    assert reported(*life, *lost[:1], *life[2:])[-1] == reported(*life)[0]


def test_a_run_reports_the_same_from_its_own_files() -> None:
    """Through JSON and back."""
    rows = [step(n, 1.0 / (n + 2), weight=n + 0.1) for n in range(1, 5)]
    rows = [row for r in rows for row in ([r, evaluation(r["step"], 1.0 / 3)] if r["step"] % 2 == 0 else [r])]
    assert reported(*(json.loads(line) for line in to_lines(rows).splitlines())) == reported(*rows)


# ---- forks ----------------------------------------------------------------------------------------

OTHER = {**IDENTITY, "train": {"learning_rate": 2e-4}}


@pytest.fixture(params=["local", "object store"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 2 and 4."""
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    run = RunDir(f"{root}/trials/0001")
    for number in (2, 4):
        save(run.checkpoints, number, ranks=2, loss=float(number))
    storage.write_bytes(
        run.metrics, to_lines([*map(step, (1, 2)), evaluation(2), *map(step, (3, 4)), evaluation(4)])
    )
    return run


@pytest.fixture
def target(source: RunDir) -> RunDir:
    return RunDir(f"{source.path}-fork")


def test_a_fork_has_the_checkpoint_and_the_metrics_up_to_it(source: RunDir, target: RunDir) -> None:
    """With an identity of its own; the run it was taken from stays as it was."""
    fork(source, 2, target, OTHER)
    manifest = catalog.newest_complete(target.checkpoints)
    there = catalog.read_manifest(catalog.directory(source.checkpoints, 2))
    assert manifest is not None
    assert (manifest.step, manifest.eval_loss, manifest.progress) == (2, 2.0, there.progress)
    assert (manifest.identity, there.identity) == (OTHER, IDENTITY)
    assert_equal(read_all(catalog.directory(target.checkpoints, 2)), state(2))
    assert target.read_metrics() == [step(1), step(2), evaluation(2)]
    assert catalog.steps(target.checkpoints) == [2]
    assert catalog.steps(source.checkpoints) == [2, 4]


def test_a_fork_that_goes_on_is_left_alone(source: RunDir, target: RunDir) -> None:
    """After a crash it must not fall back, even if the other run has long deleted the checkpoint."""
    fork(source, 2, target, OTHER)
    save(target.checkpoints, 6)
    storage.write_bytes(target.metrics, to_lines([step(6)]))
    storage.delete_dir(source.path)
    fork(source, 2, target, IDENTITY)
    assert target.read_metrics() == [step(6)]
    assert catalog.steps(target.checkpoints) == [2, 6]


def test_a_fork_that_was_interrupted_is_done_again(
    source: RunDir, target: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest comes last, so half a copy is none."""
    copied: list[str] = []
    copy = storage.copy

    def copy_one(there: str, here: str) -> None:
        if copied:
            raise OSError("killed")
        copied.append(here)
        copy(there, here)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "copy", copy_one)
        with pytest.raises(OSError, match="killed"):
            fork(source, 4, target, OTHER)
    assert catalog.newest_complete(target.checkpoints) is None
    fork(source, 4, target, OTHER)
    assert_equal(read_all(catalog.directory(target.checkpoints, 4)), state(4))


def test_a_checkpoint_that_is_not_there_is_told(source: RunDir, target: RunDir) -> None:
    """And nothing is begun."""
    with pytest.raises(CheckpointError, match="no manifest"):
        fork(source, 3, target, OTHER)
    assert target.read_metrics() == []


def test_what_keeps_a_run_from_beginning_with_the_checkpoint_of_another() -> None:
    """What a checkpoint holds does not depend on the rate, nor on dropout; all else has to be the same."""
    train = {"learning_rate": 1e-4, "weight_decay": 0.0, "global_batch": 16, "warmup_ratio": 0.03}
    there = {"run.seed": 0, "adapter": {"r": 8, "dropout": 0.0}, "train": train}
    free = {
        **there,
        "adapter": {"r": 8, "dropout": 0.1},
        "train": {**train, "learning_rate": 3e-4, "warmup_ratio": 0},
    }
    assert hindrances(there, there) == hindrances(there, free) == []
    other = {"run.seed": 1, "adapter": {"r": 16, "dropout": 0.1}, "train": {**train, "global_batch": 8}}
    assert hindrances(there, other) == [
        "run.seed: 0 there, 1 here",
        "adapter.r: 8 there, 16 here",
        "train.global_batch: 16 there, 8 here",
    ]
    (found,) = hindrances({**there, "adapter": None}, there)
    assert found.startswith("adapter: None there, {'r': 8")
    assert set(MAY_DIFFER) <= set(KEYS)
