"""A whole worker, in this process, whose batches go wrong: it stops or goes back, and its files say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ds import catalog, checkpoint, worker
from raytune_ds.assignment import Assignment
from raytune_ds.data import batchid
from raytune_ds.data.batch import Batch
from raytune_ds.data.rows import step_rows
from raytune_ds.data.store import Store
from raytune_ds.ending import Outcome
from raytune_ds.hooks import Orders
from raytune_ds.objectives import OBJECTIVES
from raytune_ds.rundir import RunDir
from raytune_ds.trained import Trained
from raytune_ds.verify import examine
from raytune_ds.watch import Pulse
from tests import alone
from tests.alone import STEPS, Events

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return alone.prepared(tmp_path_factory.mktemp("root"))


class Case:
    """One run of STEPS steps, some of which go wrong."""

    def __init__(self, store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._store, self._model = store, model
        self.root = Path(store.path).parents[1]
        self.bad: set[str] = set()
        self.events: Events = []
        monkeypatch.setitem(OBJECTIVES, "sft", self._objective(OBJECTIVES["sft"]))

    def _objective(self, objective: Any) -> Any:
        def spoiled(module: nn.Module, batch: Batch) -> torch.Tensor:
            loss = objective(module, batch)
            return loss * float("nan") if batchid.text(batch.rows) in self.bad else loss

        return spoiled

    def assignment(self, name: str, **train: Any) -> Assignment:
        return alone.assignment(self._store, self._model, str(self.root), name, **train)

    def spoil(self, *steps: int) -> None:
        order = self._store.order("train", 4, 0)
        self.bad = {step_rows(self._store, order, step).batch for step in steps}

    def run(self, assignment: Assignment) -> Outcome:
        self.events = []
        return alone.work(assignment, lambda *event: self.events.append(event))

    @property
    def warnings(self) -> list[str]:
        return [content["text"] for kind, content in self.events if kind == "warning"]


@pytest.fixture
def case(store: Store, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(worker, "_save_final", lambda *_: type("Final", (), {"size": 0}))
    return Case(store, tiny_models["llama"], monkeypatch)


def weights(assignment: Assignment) -> dict[str, torch.Tensor]:
    path = catalog.directory(assignment.run.checkpoints, STEPS)
    read_back = checkpoint.Reader(path, catalog.read_manifest(path))
    return {name: read_back.whole(name) for name in read_back.shapes}


def test_it_stops_with_its_checkpoints_whole_and_goes_on_without_the_rows(case: Case) -> None:
    case.spoil(7, 8, 9)
    stopped = case.run(case.assignment("stopped", max_skipped_steps=3))
    assert stopped.error is not None
    assert "steps 7 to 9 were skipped" in stopped.error
    assert "step 7: its rows: /rows.jsonl, row " in stopped.error
    assert case.warnings[0].startswith(
        "step 7: the loss is not finite (nan); not applied; its rows: /rows.jsonl, row"
    )
    run = RunDir(f"{case.root}/stopped")
    assert catalog.steps(run.checkpoints)[-1] == 8  # in the midst of them
    went_on = case.assignment("stopped", max_skipped_steps=3, on_skipped_steps="rewind")
    outcome = case.run(went_on)
    assert outcome.error is None
    assert outcome.progress is not None
    assert outcome.progress["lapses"]["left_out"] == [7, 8, 9]
    rewound = case.assignment("rewound", max_skipped_steps=3, on_skipped_steps="rewind")
    case.run(rewound)
    there, here = weights(went_on), weights(rewound)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_it_goes_back_and_its_metrics_have_each_step_once(case: Case) -> None:
    case.spoil(7, 8, 9)
    assignment = case.assignment("back", max_skipped_steps=3, on_skipped_steps="rewind")
    outcome = case.run(assignment)
    assert outcome.error is None
    assert outcome.progress is not None
    assert outcome.progress["step"] == STEPS
    assert outcome.progress["lapses"]["went_back_to"] == [4]
    rows = [row for row in assignment.run.read_metrics() if "loss" in row or "left_out" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row.get("left_out")] == [7, 8, 9]
    assert any("back to the checkpoint of step 4, and on without" in text for text in case.warnings)
    report = examine(Trained.read(assignment.run.path))
    assert report.problems == []
    assert report.notes == ["3 steps were left out (train.on_skipped_steps = rewind): 7 to 9"]
    # A model that never saw them is the same to the bit.
    skipped = case.assignment("skipped", max_skipped_steps=5)
    case.run(skipped)
    there, here = weights(assignment), weights(skipped)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_worker_that_ends_in_the_midst_of_it_goes_on_alike(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    case.spoil(7, 8, 9)
    assignment = case.assignment("killed", max_skipped_steps=3, on_skipped_steps="rewind")

    def killed(assignment: Assignment, steps: int) -> None:
        case.events = []
        done = 0

        def report(kind: str, content: dict[str, Any]) -> None:
            nonlocal done
            done += kind == "step"
            if done == steps:
                raise Killed

        with pytest.raises(Killed):
            alone.work(assignment, report)

    killed(assignment, 8)  # among the bad ones
    killed(assignment, 7)  # after going back
    outcome = case.run(assignment)
    assert outcome.progress is not None
    assert outcome.progress["lapses"]["left_out"] == [7, 8, 9]
    report = examine(Trained.read(assignment.run.path))
    assert (report.steps, report.problems) == (STEPS, [])
    whole = case.assignment("whole", max_skipped_steps=3, on_skipped_steps="rewind")
    case.run(whole)
    there, here = weights(assignment), weights(whole)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_worker_shows_that_it_lives_by_each_batch_and_each_file_of_a_checkpoint(case: Case) -> None:
    pulse = Pulse()
    given = case.assignment("watched")
    alone.work(given, lambda *_: None, Orders(pulse=pulse))
    beat = pulse.beat()
    assert beat.doing is None
    checkpoints = 4 + 1  # after steps 4, 8, 12 and 14, and one as a rehearsal before
    logged = STEPS + 4 + 4  # steps, what checkpoints took, and all before each checkpoint
    assert (beat.place, beat.signs - beat.place) == (2 * STEPS + 4, STEPS + checkpoints + logged)
