"""Steps that go wrong: skipped, counted, and what becomes of the run; the same after a resume and on any rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raytune_ds import loop, storage
from raytune_ds.config import Config
from raytune_ds.data.batch import EMPTY_PACK, Batch, collate
from raytune_ds.data.order import Order
from raytune_ds.engines import StepResult
from raytune_ds.errors import UserError
from raytune_ds.guard import FEWEST_LOSSES, MEDIAN_OVER, NAMED
from raytune_ds.loop import Hooks, Progress, Row
from raytune_ds.milestones import Plan
from raytune_ds.world import World
from tests.ranks import on_ranks

STEPS = 60
NAN = float("nan")


class SumEngine:
    """A model of one number, to which each applied batch adds its own; so the sum tells what was trained on."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        self.applied: list[int] = []
        self._gradient = 0.0
        self.batch = 0

    @property
    def updates(self) -> int:
        return len(self.applied)

    def backward(self, loss: torch.Tensor) -> None:
        self._gradient += float(loss)

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        norm, self._gradient = self._gradient, 0.0
        applied = wanted and math.isfinite(norm)
        if applied:
            self.applied.append(self.batch)
        return StepResult(norm, not applied)


@dataclass
class Run:
    """A run of STEPS steps whose checkpoints, as JSON text, and metrics outlive its worker.

    Attributes:
        losses: of the batch of each step, where it is not 1; asked again each time.
        train: settings.
        every: steps between two checkpoints.
        dies_after: the worker is killed once it has logged so many rows.
    """

    losses: Callable[[int, int], float] = lambda step, attempt: 1.0
    train: dict[str, Any] = field(default_factory=dict)
    every: int = 10
    dies_after: int | None = None
    keep: bool = True
    checkpoints: dict[int, tuple[str, list[int]]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    engine: SumEngine = field(default_factory=SumEngine)

    def start(self, world: World | None = None) -> Progress:
        """From the newest checkpoint on."""
        world = world or World.alone()
        self.engine, self.progress = SumEngine(), Progress()
        if self.checkpoints:
            self.progress = self._load(max(self.checkpoints))
        config = Config(
            train={"max_steps": STEPS, "global_batch": 1, **self.train},
            checkpoint={"every_steps": self.every},
        )
        logged = 0

        def log(row: Row) -> None:
            nonlocal logged
            self.rows.append(row)
            logged += 1
            if logged == self.dies_after:
                raise KeyboardInterrupt

        loop.train(
            config=config,
            plan=Plan.of(config, Order(STEPS, 32, 1, seed=0)),
            world=world,
            engine=self.engine,  # type: ignore[arg-type]
            objective=lambda module, batch: torch.tensor(self._loss(self.engine.batch)),
            batches=self._batches,
            eval_batches=None,
            hooks=Hooks(
                log=log,
                checkpoint=self._save,
                go_back=self._go_back,
                warn=self.warnings.append,
                rows=self._rows,
            ),
            progress=self.progress,
        )
        return self.progress

    def resume(self) -> Progress:
        """After a death."""
        self.dies_after = None
        return self.start()

    def _loss(self, step: int) -> float:
        attempt = self.attempts[step] = self.attempts.get(step, 0) + 1
        return self.losses(step, attempt)

    def _batches(self, after: int) -> Iterator[list[Batch]]:
        for step in range(after + 1, STEPS + 1):
            self.engine.batch = step
            yield [collate([{**EMPTY_PACK, "weights": np.ones(1, np.float32)}])]

    def _save(self, progress: Progress) -> float:
        text = json.dumps(storage.finite(asdict(progress)))
        self.checkpoints[progress.step] = (text, list(self.engine.applied))
        if not self.keep:
            self.checkpoints = {progress.step: self.checkpoints[progress.step]}
        return 0.0

    def _load(self, step: int) -> Progress:
        text, applied = self.checkpoints[step]
        self.engine.applied = list(applied)
        self.rows = [row for row in self.rows if row["step"] <= step]
        return Progress.of(json.loads(text))

    def _go_back(self, step: int) -> Progress | None:
        there = [s for s in sorted(self.checkpoints) if s < step][-1:] or sorted(self.checkpoints)[:1]
        return self._load(there[0]) if there else None

    def _rows(self, step: int) -> str:
        return f"its rows: those of {step}"

    @property
    def steps(self) -> list[int]:
        """Of the rows in metrics.jsonl."""
        return [row["step"] for row in self.rows if "loss" in row or "left_out" in row]

    @property
    def left_out(self) -> list[int]:
        return [row["step"] for row in self.rows if "left_out" in row]


def at(*steps: int, loss: float = NAN, times: int = 1000) -> Callable[[int, int], float]:
    """The loss at these steps, so many times; elsewhere 1."""
    return lambda step, attempt: loss if step in steps and attempt <= times else 1.0


def all_but(*steps: int) -> list[int]:
    return [step for step in range(1, STEPS + 1) if step not in steps]


# ---- skipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_applied(loss: float) -> None:
    run = Run(at(5, 7, 8, loss=loss))
    progress = run.start()
    assert run.engine.applied == all_but(5, 7, 8)
    assert (progress.skipped_steps, progress.lapses.spikes, progress.lapses.in_a_row) == (3, 0, [])
    assert [row["step"] for row in run.rows if row.get("skipped")] == [5, 7, 8]


def test_what_was_skipped_is_named_with_its_rows() -> None:
    run = Run(at(5))
    run.start()
    assert run.warnings == ["step 5: the loss is not finite (nan); not applied; its rows: those of 5"]


def test_of_many_in_a_row_only_the_first_have_their_rows_named() -> None:
    run = Run(at(*range(11, 18)))
    run.start()
    assert len(run.warnings) == 7
    assert ["rows" in text for text in run.warnings] == [True] * NAMED + [False] * (7 - NAMED)


def test_a_spike_is_skipped_where_it_is_asked_for() -> None:
    calm, guarded = Run(at(30, loss=4.0)), Run(at(30, loss=4.0), {"loss_spike_factor": 3})
    assert calm.start().skipped_steps == 0
    assert calm.engine.applied == all_but()
    progress = guarded.start()
    assert guarded.engine.applied == all_but(30)
    assert (progress.skipped_steps, progress.lapses.spikes) == (1, 1)
    assert "the loss is 4, more than 3 (train.loss_spike_factor)" in guarded.warnings[0]


def test_a_loss_at_the_limit_is_no_spike() -> None:
    run = Run(at(30, loss=3.0), {"loss_spike_factor": 3})
    assert run.start().skipped_steps == 0


def test_early_losses_are_not_compared() -> None:
    run = Run(at(FEWEST_LOSSES, loss=100.0), {"loss_spike_factor": 3})
    assert run.start().skipped_steps == 0
    run = Run(at(FEWEST_LOSSES + 1, loss=100.0), {"loss_spike_factor": 3})
    assert run.start().skipped_steps == 1


def test_a_spike_does_not_move_the_median_and_old_losses_are_forgotten() -> None:
    run = Run(at(20, 21, 22, loss=50.0), {"loss_spike_factor": 3})
    assert set(run.start().lapses.losses) == {1.0}
    assert len(run.progress.lapses.losses) == STEPS - 3 <= MEDIAN_OVER


def test_losses_are_not_kept_where_nobody_asks_for_them() -> None:
    assert Run().start().lapses.losses == []


# ---- stopping -------------------------------------------------------------------------------------


def test_enough_in_a_row_stop_the_run_and_name_steps_and_rows() -> None:
    run = Run(at(*range(34, 60)), {"max_skipped_steps": 4})
    with pytest.raises(UserError) as caught:
        run.start()
    text = str(caught.value)
    assert "train.max_skipped_steps = 4: steps 34 to 37 were skipped" in text
    assert "step 34: its rows: those of 34" in text
    assert "on_skipped_steps=rewind" in text
    assert run.engine.applied == list(range(1, 34))
    assert max(run.checkpoints) == 30  # nothing worth keeping was done since


def test_one_good_step_between_them_and_it_goes_on() -> None:
    run = Run(at(34, 35, 36, 38, 39, 40), {"max_skipped_steps": 4})
    assert run.start().step == STEPS


def test_spikes_and_what_is_not_finite_are_counted_together() -> None:
    def losses(step: int, attempt: int) -> float:
        return {34: NAN, 35: 9.0, 36: math.inf, 37: 9.0}.get(step, 1.0)

    run = Run(losses, {"max_skipped_steps": 4, "loss_spike_factor": 2})
    with pytest.raises(UserError, match="steps 34 to 37"):
        run.start()
    assert run.progress.lapses.spikes == 2


@pytest.mark.parametrize("dies_after", [31, 35, 36, 37])
@pytest.mark.parametrize("every", [5, 7, 10, 1])
def test_a_resumed_run_stops_at_the_same_step(every: int, dies_after: int) -> None:
    """Also with a checkpoint in the middle of the bad steps."""
    run = Run(at(*range(34, 60)), {"max_skipped_steps": 4}, every=every, dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    with pytest.raises(UserError, match="steps 34 to 37"):
        run.resume()


def test_all_ranks_stop_alike_and_ask_each_other_nothing_new() -> None:
    """Two sums a step, as without a guard."""
    sums: list[int] = []

    def ranked(world: World) -> str:
        before = type(world).sum

        def counted(self: World, *values: torch.Tensor | float) -> list[float]:
            sums.append(self.rank)
            return before(self, *values)

        object.__setattr__(world, "sum", counted.__get__(world))
        run = Run(
            lambda step, attempt: NAN if step > 3 and world.rank == 1 else 1.0, {"max_skipped_steps": 4}
        )
        with pytest.raises(UserError) as caught:
            run.start(world)
        assert run.engine.applied == [1, 2, 3]
        return str(caught.value)

    texts = on_ranks(3, ranked)
    assert len(set(texts)) == 1
    assert "steps 4 to 7" in texts[0]
    assert [sums.count(rank) for rank in range(3)] == [2 * 7] * 3


# ---- going back -----------------------------------------------------------------------------------

REWIND = {"max_skipped_steps": 3, "on_skipped_steps": "rewind"}


def test_it_goes_back_and_leaves_the_batches_out() -> None:
    run = Run(at(34, 35, 36), REWIND)
    progress = run.start()
    assert run.engine.applied == all_but(34, 35, 36)
    assert run.steps == list(range(1, STEPS + 1))
    assert run.left_out == progress.lapses.left_out == [34, 35, 36]
    assert progress.lapses.went_back_to == [30]
    assert (progress.step, progress.skipped_steps) == (STEPS, 0)
    assert (
        "back to the checkpoint of step 30, and on without the batches of steps 34 to 36" in run.warnings[-1]
    )
    assert run.attempts[33] == 2
    assert run.attempts[34] == 1


def test_a_model_that_is_broken_by_an_applied_step_is_mended_by_leaving_more_out() -> None:
    """Step 32 looks right and breaks the model: whatever comes after it is not finite."""

    def losses(step: int, attempt: int) -> float:
        return NAN if 32 in run.engine.applied else 1.0

    run = Run(losses, REWIND)
    progress = run.start()
    assert progress.lapses.went_back_to == [30, 30]
    # First 33 to 35; then, as 36 to 38 are no better, all since the checkpoint.
    assert run.left_out == list(range(31, 39))
    assert run.engine.applied == all_but(*range(31, 39))


def test_the_third_time_at_the_same_checkpoint_it_stops() -> None:
    run = Run(lambda step, attempt: NAN if step > 33 else 1.0, REWIND)
    with pytest.raises(UserError, match="It went back to the checkpoint of step 30 twice before"):
        run.start()


def test_checkpoints_in_the_midst_of_bad_steps_are_not_what_it_goes_back_to() -> None:
    run = Run(at(34, 35, 36), REWIND, every=5)
    progress = run.start()
    assert progress.lapses.went_back_to == [30]
    run = Run(at(34, 35, 36), REWIND, every=1)
    assert run.start().lapses.went_back_to == [33]
    assert run.engine.applied == all_but(34, 35, 36)


def test_if_only_such_a_checkpoint_is_left_it_will_do() -> None:
    """A skipped step changes nothing, so the model in it is that from before them."""
    run = Run(at(34, 35, 36), REWIND, every=1, keep=False)
    progress = run.start()
    assert progress.lapses.left_out == [34, 35, 36]
    assert run.engine.applied == all_but(34, 35, 36)
    assert progress.step == STEPS


def test_bad_steps_before_the_first_interval_go_back_to_the_beginning() -> None:
    run = Run(at(1, 2, 3), REWIND)
    progress = run.start()
    assert progress.lapses.went_back_to == [0]
    assert run.engine.applied == all_but(1, 2, 3)


def test_without_a_checkpoint_it_stops_and_says_so() -> None:
    class Failing(Run):
        def _save(self, progress: Progress) -> float:
            return 0.0  # a full disk

    run = Failing(at(3, 4, 5), REWIND)
    with pytest.raises(UserError, match="There is no checkpoint to go back to"):
        run.start()


@pytest.mark.parametrize("dies_after", [*range(30, 48, 2), 50, 60, 63])
@pytest.mark.parametrize("every", [3, 10])
def test_a_run_killed_around_going_back_ends_with_the_same_model(every: int, dies_after: int) -> None:
    """Before it, in it, and while what was lost is made up for."""
    calm = Run(at(34, 35, 36, 41, 42, 43), REWIND, every=every)
    calm.start()
    run = Run(at(34, 35, 36, 41, 42, 43), REWIND, every=every, dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        run.start()
    progress = run.resume()
    assert run.engine.applied == calm.engine.applied == all_but(34, 35, 36, 41, 42, 43)
    assert run.steps == list(range(1, STEPS + 1))
    assert run.left_out == progress.lapses.left_out == [34, 35, 36, 41, 42, 43]


def test_a_resumed_run_judges_losses_by_those_from_before() -> None:
    def losses(step: int, attempt: int) -> float:
        return 5.0 if step == 32 else 1.0 + step / STEPS

    calm = Run(losses, {"loss_spike_factor": 2})
    run = Run(losses, {"loss_spike_factor": 2}, dies_after=33)
    calm.start()
    with pytest.raises(KeyboardInterrupt):
        run.start()
    assert run.resume().lapses == calm.progress.lapses
    assert run.engine.applied == calm.engine.applied == all_but(32)


def test_a_manifest_from_before_there_were_lapses_is_read() -> None:
    values = asdict(Progress(step=5))
    del values["lapses"]
    assert Progress.of(values) == Progress(step=5)


def test_what_was_counted_since_the_checkpoint_is_not_counted_twice() -> None:
    run = Run(at(34, 35, 36, loss=9.0), {**REWIND, "loss_spike_factor": 2})
    lapses = run.start().lapses
    assert lapses.left_out == [34, 35, 36]
    assert (lapses.spikes, len(lapses.losses)) == (0, STEPS - 3)
