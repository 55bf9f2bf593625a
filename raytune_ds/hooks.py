"""What the loop of a worker sets off: metrics, checkpoints, and heeding what others want of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from raytune_ds import checkpoint
from raytune_ds.assignment import Assignment
from raytune_ds.checkpoint import Reader
from raytune_ds.data.rows import name_rows
from raytune_ds.engines import Engine
from raytune_ds.loop import Hooks, Progress, Row
from raytune_ds.model.flops import Utilisation
from raytune_ds.profiling import Profile
from raytune_ds.saver import Label, Saver
from raytune_ds.tracking import Tracking
from raytune_ds.watch import Pulse
from raytune_ds.world import World

Report = Callable[[str, dict[str, Any]], None]
"""Tells what happens: a kind (start, step, eval, checkpoint, checkpoint_wait, note, warning), its content."""

Judge = Callable[[int], bool]
"""Whether to train on after the evaluation at some step; each rank asks once its share of the checkpoint is written."""


@dataclass(frozen=True)
class Orders:
    """What others want of the workers while they train.

    Attributes:
        judge: if evaluations are judged.
        stop_asked: whether the run is to stop, at the next step and with a checkpoint; asked on rank 0.
        is_leaving: whether a node is about to go that was not before, or now very soon; all ranks call it together.
        pulse: what they see of this worker meanwhile.
    """

    judge: Judge | None = None
    stop_asked: Callable[[], bool] = lambda: False
    is_leaving: Callable[[], bool] = lambda: False
    pulse: Pulse = field(default_factory=Pulse)


# A checkpoint that training stands still for longer is worth a line.
LONG_WAIT_S = 5.0
# Nodes are given notice of half a minute and more.
LOOK_EVERY_S = 5.0


def hooks_of(
    assignment: Assignment,
    world: World,
    engine: Engine,
    saver: Saver,
    tracking: Tracking | None,
    report: Report,
    orders: Orders,
    utilisation: Utilisation | None = None,
    profile: Profile | None = None,
) -> Hooks:
    """The hooks of a worker's loop.

    Args:
        assignment: of the worker.
        world: the ranks.
        engine: holds the model.
        saver: takes checkpoints.
        tracking: writes metrics; None but on rank 0.
        report: tells what happens.
        orders: what others want.
        utilisation: figures of it go into the rows of steps.
        profile: of some steps.
    """
    config, plan, run = assignment.config, assignment.plan, assignment.run

    def log(row: Row) -> None:
        is_step = "loss" in row
        if is_step and utilisation is not None:
            row = row | utilisation.figures(row)
        if profile is not None:
            profile.log(row)
        if tracking is not None:
            with orders.pulse.resting():  # a tracker's server may keep us waiting, and is given up by itself
                tracking.log(row, plot=not is_step or row["step"] % config.train.logging_steps == 0)
        if is_step:
            report("step", row)
        elif "eval_loss" in row:
            report("eval", row)
        elif "checkpoint_wait_s" in row:
            report("checkpoint_wait", row)

    def save(progress: Progress) -> float:
        if tracking is not None:
            with orders.pulse.resting():
                tracking.flush()
        measured = progress.last_eval_loss if progress.eval_step == progress.step else None
        waited = saver.save(Label(progress.step, asdict(progress), measured))
        if waited > LONG_WAIT_S:
            report(
                "note",
                {"text": f"step {progress.step}: training stood still for a checkpoint for {waited:.0f}s"},
            )
        return waited

    def goes_on(step: int) -> bool:
        if orders.judge is None:
            return True
        saver.wait()  # whoever judges may kill this process at once
        orders.pulse.rests()  # a verdict may take hours: other trials may have to come as far first
        # Each rank waits by itself: whoever waited in a collective would give up after half an hour.
        return bool(world.broadcast(orders.judge(step)))

    looked = time.monotonic()

    def wishes() -> tuple[bool, bool]:
        nonlocal looked
        if not world.is_main:
            return False, False
        looks = time.monotonic() - looked > LOOK_EVERY_S
        looked = time.monotonic() if looks else looked
        return looks, orders.stop_asked()

    def is_leaving() -> bool:
        leaves = bool(world.broadcast(orders.is_leaving()))  # clocks differ
        if leaves:
            report("note", {"text": "a node is about to go: taking a checkpoint"})
        return leaves

    def warn(text: str) -> None:
        report("warning", {"text": text})

    def go_back(step: int) -> Progress | None:
        saver.wait()
        orders.pulse.rests()  # nobody sees how far the reading of a checkpoint is
        found = checkpoint.newest(run.checkpoints, world, warn, below=step)
        if found is None:
            return None
        path, manifest = found
        engine.load(Reader(path, manifest), manifest.updates)
        if tracking is not None:
            tracking.rewind(manifest.step)
        return Progress.of(manifest.progress)

    def rows(step: int) -> str:
        return name_rows(assignment.store, plan.order, step) if world.is_main else ""

    return Hooks(
        log=log,
        checkpoint=save,
        go_back=go_back,
        begins=profile.begins if profile is not None else lambda step: None,
        goes_on=goes_on,
        moves=orders.pulse.moves,
        lives=orders.pulse.lives,
        wishes=wishes,
        is_leaving=is_leaving,
        warn=warn,
        rows=rows,
    )
