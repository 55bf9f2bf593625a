"""The training loop of one worker, from top to bottom. It knows no engine by name, and no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from raytune_ds.bysource import UNTOLD, Sources
from raytune_ds.config import Config
from raytune_ds.data import batchid
from raytune_ds.data.batch import Batch
from raytune_ds.engines import Engine
from raytune_ds.guard import NAMED, Guard, Lapses
from raytune_ds.milestones import Plan
from raytune_ds.objectives import Objective
from raytune_ds.phases import phase
from raytune_ds.schedule import lr_multiplier
from raytune_ds.world import World

Row = dict[str, Any]


@dataclass(frozen=True)
class Hooks:
    """What the loop sets off without knowing how it is done.

    Attributes:
        log: takes one row for metrics.jsonl; called on every rank (only times differ).
        checkpoint: saves the state as it is, and returns the seconds that training stood still for it; all ranks
            call it together.
        go_back: loads the newest checkpoint from before a step, and returns the progress in it; None if there is no
            checkpoint. All ranks call it together.
        begins: hears of each step before its batch is fetched; called on every rank.
        goes_on: whether to train on after an evaluation; the same on all ranks, which call it together.
        moves: hears what the rank is at, at each place where ranks wait for each other.
        lives: called in between, for each batch.
        wishes: whether this rank wants all to look for a node that is about to go, and whether it wants the end.
        is_leaving: whether one is; all ranks call it together, after one of them wished it.
        warn: takes what somebody should look at; called on every rank.
        rows: names some rows of a step's batch; called on every rank, and nobody sees but what rank 0 says.
    """

    log: Callable[[Row], None]
    checkpoint: Callable[[Progress], float]
    go_back: Callable[[int], Progress | None] = lambda step: None
    begins: Callable[[int], None] = lambda step: None
    goes_on: Callable[[int], bool] = lambda step: True
    moves: Callable[[str], None] = lambda doing: None
    lives: Callable[[], None] = lambda: None
    wishes: Callable[[], tuple[bool, bool]] = lambda: (False, False)
    is_leaving: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda text: None
    rows: Callable[[int], str] = lambda step: ""


@dataclass
class Progress:
    """What a run has counted so far; a checkpoint keeps it.

    Attributes:
        seconds: of all steps; what data_wait_s says is a part of it, while the other three come on top.
        eval_s: of evaluations.
        log_s: of writing metrics, to files and trackers.
    """

    step: int = 0
    tokens: int = 0
    supervised: float = 0.0
    skipped_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    best_eval_loss: float | None = None
    eval_step: int | None = None
    seconds: float = 0.0
    data_wait_s: float = 0.0
    checkpoint_wait_s: float = 0.0
    eval_s: float = 0.0
    log_s: float = 0.0
    lapses: Lapses = field(default_factory=Lapses)

    @staticmethod
    def of(values: dict[str, Any]) -> Progress:
        """From a checkpoint's manifest."""
        return Progress(**{**values, "lapses": Lapses(**values.get("lapses", {}))})


def train(
    config: Config,
    plan: Plan,
    world: World,
    engine: Engine,
    objective: Objective,
    batches: Callable[[int], Iterator[list[Batch]]],
    eval_batches: Callable[[], Iterable[list[Batch]]] | None,
    hooks: Hooks,
    progress: Progress,
    sources: Sources = UNTOLD,
) -> Progress:
    """Trains from `progress.step` to the end, or to the step after which `hooks` want no more.

    Args:
        config: of the run.
        plan: of the run.
        world: the ranks.
        engine: holds the model and applies gradients.
        objective: a batch to the losses of its documents.
        batches: this rank's micro-batches of each step after a given one, as many on every rank.
        eval_batches: the same for one pass over the held-out data; None if there are none.
        hooks: where rows and checkpoints go.
        progress: where the run stands.
        sources: whose losses are logged apart.

    Returns:
        The progress at the end, of which there is a checkpoint.

    Raises:
        UserError: too many steps went wrong, one after the other; on all ranks alike.
    """
    multiplier = lr_multiplier(config.train, plan.total_steps)
    guard = Guard(config.train, progress.lapses)
    engine.module.train()

    def loss_of(module: nn.Module, batch: Batch) -> torch.Tensor:
        hooks.lives()
        return objective(module, batch)

    def log(row: Row) -> None:
        with phase("logging"), _timed(progress, "log_s"):
            hooks.log(row)

    def step(micro_batches: list[Batch], started: float) -> tuple[bool, bool]:
        hooks.moves(f"computing step {progress.step + 1}")
        data_wait = time.perf_counter() - started
        lr = config.train.learning_rate * multiplier(progress.step)
        seed_step(config.run.seed, progress.step, world.rank)
        wishes = hooks.wishes()
        row = optimizer_step(engine, loss_of, micro_batches, world, lr, wishes, guard.highest_loss, sources)
        wishes = row.pop("wishes")
        progress.step += 1
        seconds = time.perf_counter() - started
        row = {**_place(progress, plan), **row}
        row |= {"step_time_s": seconds, "tokens_per_s": row["tokens"] / seconds, "data_wait_s": data_wait}
        _note_step(progress, row, seconds)
        log({**row, "world_size": world.size})
        text = guard.describe(row) if row["skipped"] else None
        guard.note(row)
        if text is not None:
            hooks.warn(f"{text}; {hooks.rows(progress.step)}" if guard.names_rows else text)
        return wishes

    def evaluate() -> None:
        if eval_batches is not None:
            hooks.moves(f"measuring the held-out loss after step {progress.step}")
            with phase("evaluation"), _timed(progress, "eval_s"):
                measured = mean_losses(engine.module, loss_of, eval_batches(), world, sources)
            _note_eval(progress, measured["eval_loss"])
            log({"step": progress.step, **measured})

    def save() -> None:
        hooks.moves(f"taking the checkpoint of step {progress.step}")
        with phase("checkpoint"):
            waited = hooks.checkpoint(progress)
        progress.checkpoint_wait_s += waited
        log({"step": progress.step, "checkpoint_wait_s": waited})

    def go_back() -> None:
        skipped = progress.lapses.in_a_row
        rows = {step: hooks.rows(step) for step in skipped[:NAMED]}
        if not guard.rewinds:
            raise guard.stop(rows)
        earlier = hooks.go_back(skipped[0])
        if earlier is None:
            raise guard.stop(rows, " There is no checkpoint to go back to.")
        hooks.warn(guard.go_back(earlier.step, earlier.lapses, rows))
        vars(progress).update(vars(replace(earlier, lapses=progress.lapses)))

    if progress.step == 0 and progress.eval_step is None:
        evaluate()
    if progress.step == 0 and guard.rewinds:
        save()
    goes_on, stream = True, batches(progress.step)
    while goes_on and progress.step < plan.total_steps:
        hooks.begins(progress.step + 1)
        started = time.perf_counter()
        hooks.moves(f"fetching the batch of step {progress.step + 1}")
        with phase("fetch"):
            micro_batches = next(stream)
        looks = stops = False
        if guard.leaves_out(progress.step + 1):
            progress.step += 1
            log({**_place(progress, plan), "left_out": True})
        else:
            looks, stops = step(micro_batches, started)
        if guard.had_enough:
            go_back()
            stream = batches(progress.step)
            continue

        if plan.evaluates(progress.step):
            evaluate()
        is_best = progress.eval_step == progress.step and progress.last_eval_loss == progress.best_eval_loss
        saved = plan.saves(progress.step) or (is_best and plan.checkpoint_best)
        saved = (looks and hooks.is_leaving()) or saved
        if saved:
            save()
        if plan.evaluates(progress.step) and progress.step < plan.total_steps:
            goes_on = hooks.goes_on(progress.step)
        goes_on = goes_on and not stops
        if not (goes_on or saved):
            save()
    return progress


def optimizer_step(
    engine: Engine,
    objective: Objective,
    micro_batches: list[Batch],
    world: World,
    lr: float,
    wishes: tuple[bool, bool] = (False, False),
    highest_loss: float = math.inf,
    sources: Sources = UNTOLD,
) -> Row:
    """One update from the micro-batches of all ranks; none if the loss is above `highest_loss` or not finite.

    The global weight is known before the first backward pass, so the gradient is that of the mean over all supervised
    tokens of the global batch, however the batch is cut: there is no mean of means.
    """
    weights = sources.nothing(torch.device("cpu"))
    for batch in micro_batches:
        weights += sources.sums(batch, batch.weights_S)
    trained = [batch for batch in micro_batches if batch.weight != 0]
    counts = [sum(counted) for counted in zip((0, 0, 0), *map(_counts, trained), strict=True)]
    rows = batchid.halves(sum(batch.rows for batch in micro_batches))
    tokens, targets, pairs, *told = world.sum(*counts, *rows, *weights)
    global_rows, global_weights = told[:2], told[2:]
    losses = sources.nothing(world.device)
    for batch in micro_batches:
        with phase("forward"):
            on_device = batch.to(world.device)
            losses_S = objective(engine.module, on_device)
        with phase("backward"):
            engine.backward(losses_S.sum() / global_weights[0])
        losses += sources.sums(on_device, losses_S.detach())
    # What a rank wishes travels with the loss: all of them hear of it at the same step, at no cost.
    looks, stops, *global_losses = world.sum(*wishes, *losses)
    means = sources.means("loss", global_losses, global_weights)
    global_mean = means["loss"]
    with phase("optimizer"):
        result = engine.step(lr, wanted=math.isfinite(global_mean) and global_mean <= highest_loss)
    return {
        **means,
        "weight": global_weights[0],
        "tokens": int(tokens),
        "targets": int(targets),
        "pairs": int(pairs),
        "lr": lr,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
        "wishes": (looks > 0, stops > 0),
        "batch": batchid.text(batchid.joined(*global_rows)),
    }


def _counts(batch: Batch) -> tuple[int, int, int]:
    return batch.num_tokens, batch.num_targets, batch.num_pairs


@torch.no_grad()
def mean_losses(
    module: nn.Module,
    objective: Objective,
    batches: Iterable[list[Batch]],
    world: World,
    sources: Sources = UNTOLD,
) -> dict[str, float]:
    """The mean loss per supervised token over held-out data, in nats: `eval_loss`, and `eval_loss/SOURCE` of each."""
    module.eval()
    weights, losses = sources.nothing(torch.device("cpu")), sources.nothing(world.device)
    for micro_batches in batches:
        for batch in micro_batches:
            weights += sources.sums(batch, batch.weights_S)
            on_device = batch.to(world.device)
            losses += sources.sums(on_device, objective(module, on_device))
    module.train()
    summed = world.sum(*losses, *weights)
    return sources.means("eval_loss", summed[: len(losses)], summed[len(losses) :])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout depends on step and rank alone, so a resumed run needs no stored generator state."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def _place(progress: Progress, plan: Plan) -> Row:
    return {"step": progress.step, "epoch": round(progress.step / plan.order.steps_per_epoch, 4)}


@contextmanager
def _timed(progress: Progress, sum_of: str) -> Iterator[None]:
    """Adds the time that passes within to one of the progress's sums."""
    began = time.perf_counter()
    yield
    setattr(progress, sum_of, getattr(progress, sum_of) + time.perf_counter() - began)


def _note_step(progress: Progress, row: Row, seconds: float) -> None:
    progress.tokens += row["tokens"]
    progress.supervised += row["weight"]
    progress.skipped_steps += row["skipped"]
    progress.seconds += seconds
    progress.data_wait_s += row["data_wait_s"]
    progress.last_loss = row["loss"]
    if progress.first_loss is None:
        progress.first_loss = row["loss"]


def _note_eval(progress: Progress, loss: float) -> None:
    progress.last_eval_loss, progress.eval_step = loss, progress.step
    best = progress.best_eval_loss
    if not math.isnan(loss) and (best is None or loss < best):
        progress.best_eval_loss = loss
    if progress.first_eval_loss is None:
        progress.first_eval_loss = loss
