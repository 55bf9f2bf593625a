"""What happens when in a run: its length, its evaluations and its checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ds.config import Config
from raytune_ds.data.order import Order
from raytune_ds.milestones import Plan


def plan(num_packs: int = 1600, every: int | str = "auto", **train: Any) -> Plan:
    """Of a run on so many packs, 16 a step."""
    config = Config(train=train, checkpoint={"every_steps": every})
    return Plan.of(config, Order(num_packs, 64, config.train.global_batch, seed=0))


def evaluated(found: Plan) -> list[int]:
    return [step for step in range(1, found.total_steps + 1) if found.evaluates(step)]


def saved(found: Plan) -> list[int]:
    return [step for step in range(1, found.total_steps + 1) if found.saves(step)]


# ---- length ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_packs", "train", "total"),
    [
        (1600, {}, 300),
        (1601, {}, 303),  # the last batch of an epoch is partial
        (1600, {"num_train_epochs": 0.5}, 50),
        (1600, {"num_train_epochs": 1.234}, 123),
        (3, {"num_train_epochs": 0.001}, 1),
        (1600, {"max_steps": 7}, 7),
        (16, {"max_steps": 1000, "num_train_epochs": 2}, 1000),
        (1600, {"global_batch": 32}, 150),
    ],
)
def test_the_length_of_a_run(num_packs: int, train: dict[str, Any], total: int) -> None:
    assert plan(num_packs, **train).total_steps == total


# ---- evaluations ----------------------------------------------------------------------------------


def test_the_held_out_loss_is_measured_every_so_many_steps_and_at_the_end() -> None:
    assert evaluated(plan(max_steps=10, eval_steps=3)) == [3, 6, 9, 10]
    assert evaluated(plan(max_steps=9, eval_steps=3)) == [3, 6, 9]
    assert evaluated(plan(max_steps=5, eval_steps=100)) == [5]
    assert evaluated(plan(max_steps=3, eval_steps=1)) == [1, 2, 3]


def test_by_default_it_is_measured_once_an_epoch() -> None:
    assert evaluated(plan(num_train_epochs=3)) == [100, 200, 300]
    assert evaluated(plan(num_train_epochs=2.5)) == [100, 200, 250]
    assert evaluated(plan(num_train_epochs=0.3)) == [30]


@pytest.mark.parametrize("epochs", [20, 21, 50, 1000])
def test_of_many_short_epochs_not_each_is_measured(epochs: int) -> None:
    steps = evaluated(plan(num_packs=32, num_train_epochs=epochs))
    assert len(steps) <= 20
    assert steps[-1] == 2 * epochs
    gaps = {later - step for step, later in zip([0, *steps[:-2]], steps[:-1], strict=True)}
    assert len(gaps) == 1


# ---- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_every_so_many_steps_and_at_the_end() -> None:
    assert saved(plan(max_steps=10, every=4, eval_steps=3)) == [4, 8, 10]
    assert saved(plan(max_steps=8, every=4, eval_steps=3)) == [4, 8]
    assert saved(plan(max_steps=5, every=100, eval_steps=1)) == [5]


@pytest.mark.parametrize(
    ("total", "every"), [(1, 10), (99, 10), (100, 10), (101, 11), (2000, 200), (5000, 500), (50_000, 500)]
)
def test_auto_takes_one_a_tenth_of_the_run(total: int, every: int) -> None:
    found = plan(max_steps=total, eval_steps=total)
    assert found.checkpoint_every == every
    steps = saved(found)
    assert steps == sorted({*range(every, total + 1, every), total})
    assert max(b - a for a, b in zip([0, *steps], steps, strict=False)) <= every


def test_auto_takes_one_at_the_best_evaluation_too() -> None:
    # So that the best held-out loss has a checkpoint; see test_loop.
    assert plan(max_steps=50, eval_steps=15).checkpoint_best
    assert not plan(every=10, max_steps=50, eval_steps=15).checkpoint_best


@pytest.mark.parametrize("total", [1, 2, 7, 30, 31])
@pytest.mark.parametrize("eval_steps", [None, 1, 4, 100])
@pytest.mark.parametrize("every", ["auto", 1, 4, 100])
def test_the_last_step_is_always_measured_and_saved(
    total: int, eval_steps: int | None, every: int | str
) -> None:
    found = plan(every=every, max_steps=total, eval_steps=eval_steps)
    assert evaluated(found)[-1] == saved(found)[-1] == total
    if every == 1:
        assert saved(found) == list(range(1, total + 1))
