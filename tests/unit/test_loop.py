"""The training loop: when it saves, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ds import loop
from raytune_ds.config import Config
from raytune_ds.data.batch import Batch, collate
from raytune_ds.data.order import Order
from raytune_ds.engines import StepResult
from raytune_ds.loop import Hooks, Progress
from raytune_ds.milestones import Plan
from raytune_ds.world import World


class StillEngine:
    """Steps without changing anything."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        self.updates = 0

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        self.updates += 1
        return StepResult(1.0, skipped=False)


def empty_batches() -> Iterator[list[Batch]]:
    while True:
        yield [collate([])]


def run(
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    every: int | str,
    goes_on: Callable[[int], bool] = lambda step: True,
    wished: dict[int, tuple[bool, bool]] | None = None,
    is_leaving: Callable[[], bool] = lambda: False,
    moves: Callable[[str], None] = lambda doing: None,
) -> tuple[list[int], Progress, list[Any]]:
    """Steps that were saved, in a run of 20 that is evaluated every third step with these losses."""
    config = Config(train={"max_steps": 20, "eval_steps": 3}, checkpoint={"every_steps": every})
    measured, saved, rows = iter(losses), [], []
    monkeypatch.setattr(loop, "mean_losses", lambda *_: {"eval_loss": next(measured)})
    steps = count(1)

    def step(*_: Any) -> dict[str, Any]:
        wishes = (wished or {}).get(next(steps), (False, False))
        return {"loss": 1.0, "weight": 1.0, "tokens": 1, "skipped": False, "wishes": wishes}

    monkeypatch.setattr(loop, "optimizer_step", step)

    def save(progress: Progress) -> float:
        saved.append(progress.step)
        return 0.25

    progress = Progress()
    loop.train(
        config=config,
        plan=Plan.of(config, Order(320, 64, config.train.global_batch, seed=0)),
        world=World.alone(),
        engine=StillEngine(),  # type: ignore[arg-type]
        objective=lambda *_: torch.zeros(()),
        batches=lambda step: empty_batches(),
        eval_batches=lambda: [],
        hooks=Hooks(log=rows.append, checkpoint=save, goes_on=goes_on, is_leaving=is_leaving, moves=moves),
        progress=progress,
    )
    return saved, progress, rows


# Before the first step, and after steps 3, 6, 9, 12, 15, 18 and 20.
LOSSES = [5.0, 4.0, 4.5, 3.0, float("nan"), 3.0, 0.0, 1.0]


def test_the_best_evaluations_are_saved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, progress, _ = run(monkeypatch, LOSSES, "auto")
    assert saved == [3, 9, 10, 15, 18, 20]  # 15 equals the best
    assert progress.best_eval_loss == 0.0
    assert (progress.first_eval_loss, progress.last_eval_loss, progress.eval_step) == (5.0, 1.0, 20)


def test_a_first_loss_that_is_not_a_number_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, progress, _ = run(monkeypatch, [float("nan"), *LOSSES[1:]], "auto")
    assert saved == [3, 9, 10, 15, 18, 20]
    assert progress.best_eval_loss == 0.0


def test_a_fixed_interval_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, LOSSES, 8)[0] == [8, 16, 20]


def test_standing_still_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, progress, rows = run(monkeypatch, LOSSES, 8)
    assert progress.checkpoint_wait_s == 0.25 * len(saved)
    waits = [row for row in rows if "checkpoint_wait_s" in row]
    assert [(row["step"], row["checkpoint_wait_s"]) for row in waits] == [(step, 0.25) for step in saved]


def test_after_each_evaluation_but_the_last_it_is_asked_whether_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not before the first step either: nothing was trained for that evaluation."""
    asked: list[int] = []
    saved, progress, _ = run(monkeypatch, LOSSES, 8, lambda step: not asked.append(step))
    assert asked == [3, 6, 9, 12, 15, 18]
    assert (saved, progress.step) == ([8, 16, 20], 20)


@pytest.mark.parametrize(
    ("every", "last", "steps"),
    [
        (8, 3, [3]),  # no checkpoint was due
        (8, 9, [8, 9]),
        (3, 9, [3, 6, 9]),  # one was
        ("auto", 9, [3, 9]),  # the best loss so far
        ("auto", 6, [3, 6]),
    ],
)
def test_a_run_that_is_not_to_go_on_ends_with_one_checkpoint_of_its_last_step(
    monkeypatch: pytest.MonkeyPatch, every: int | str, last: int, steps: list[int]
) -> None:
    """It is as good as any other: what was trained can be gone on with."""
    saved, progress, rows = run(monkeypatch, LOSSES, every, lambda step: step < last)
    assert saved == steps
    assert (progress.step, progress.eval_step) == (last, last)
    assert max(row["step"] for row in rows) == last
    assert rows[-1] == {"step": last, "checkpoint_wait_s": 0.25}


def test_a_node_that_is_about_to_go_gets_a_checkpoint_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody looks before a rank wishes it, for that takes a collective."""
    answers = iter([False, True, False])
    wished = {2: (True, False), 4: (True, False), 6: (True, False)}
    saved, progress, _ = run(monkeypatch, LOSSES, 8, wished=wished, is_leaving=lambda: next(answers))
    assert (saved, progress.step) == ([4, 8, 16, 20], 20)
    assert next(answers, "none left") == "none left"


@pytest.mark.parametrize(("step", "steps"), [(5, [5]), (8, [8]), (20, [8, 16, 20])])
def test_a_run_that_is_to_stop_ends_with_one_checkpoint(
    monkeypatch: pytest.MonkeyPatch, step: int, steps: list[int]
) -> None:
    saved, progress, _ = run(monkeypatch, LOSSES, 8, wished={step: (False, True)})
    assert (saved, progress.step) == (steps, step)


def test_it_says_what_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is at it, for it may never come back."""
    said: list[str] = []
    run(monkeypatch, LOSSES, 2, moves=said.append)
    assert said[:8] == [
        "measuring the held-out loss after step 0",
        "fetching the batch of step 1",
        "computing step 1",
        "fetching the batch of step 2",
        "computing step 2",
        "taking the checkpoint of step 2",
        "fetching the batch of step 3",
        "computing step 3",
    ]
