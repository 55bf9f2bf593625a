"""One worker from its start to its end: builds what the loop needs, finds where the run stands, trains, saves.

No Ray here: a benchmark or a debugger runs a worker in its own process.
"""

from __future__ import annotations

import copy
import platform
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from raytune_ds import allocator, catalog, checkpoint, engines, storage
from raytune_ds.assignment import Assignment, require_same_run
from raytune_ds.bysource import Sources
from raytune_ds.catalog import Manifest
from raytune_ds.checkpoint import Reader
from raytune_ds.config import PROFILED_STEPS
from raytune_ds.data.batch import Batch, read
from raytune_ds.data.chat import as_trained
from raytune_ds.data.order import Order
from raytune_ds.data.share import Share
from raytune_ds.data.store import Store
from raytune_ds.data.tokenizer import load_tokenizer
from raytune_ds.ending import Outcome
from raytune_ds.engines.choose import Choice, Sizes, choose
from raytune_ds.errors import UserError
from raytune_ds.export import Final, describe, save_final
from raytune_ds.hooks import Orders, Report, hooks_of
from raytune_ds.loop import Progress, train
from raytune_ds.memory import Cut, Situation, busy_packs, fitted, looked_after
from raytune_ds.model import initial
from raytune_ds.model.build import Built, build
from raytune_ds.model.flops import Flops, Utilisation, peak_flops
from raytune_ds.model.folder import fingerprint
from raytune_ds.model.initial import Initial
from raytune_ds.model.kernels import Kernels
from raytune_ds.model.load import compute_dtype
from raytune_ds.modelcard import model_card
from raytune_ds.modelfiles import ExportError
from raytune_ds.objectives import OBJECTIVES
from raytune_ds.profiling import Profile
from raytune_ds.saver import Label, Saver, Written
from raytune_ds.schedule import warmup_steps
from raytune_ds.tracking import Tracking
from raytune_ds.world import World

T = TypeVar("T")

OpenStream = Callable[[Store, Share, range], Iterator[list[Batch]]]
"""How the batches of some steps come to this worker."""

EVAL_BATCH = 16


def run_worker(
    assignment: Assignment,
    world: World,
    open_stream: OpenStream,
    report: Report,
    orders: Orders | None = None,
) -> Outcome:
    """Trains this rank's share of the run, from where its newest checkpoint left it."""
    # A mistake of the user's is returned, not raised: raised, it would look like a crash and be tried again.
    try:
        return _run(assignment, world, open_stream, report, orders or Orders())
    except UserError as error:
        return Outcome(error=str(error))


def _run(
    assignment: Assignment, world: World, open_stream: OpenStream, report: Report, orders: Orders
) -> Outcome:
    config, plan = assignment.config, assignment.plan
    dtype = _common_dtype(assignment, world)
    sizes, memory = _sizes(assignment, world, dtype), world.least_memory()
    choice = choose(config.engine, sizes, memory, world.size, config.adapter.kind)
    report("note", {"text": f"engine: {choice.kind} ({choice.why})"})
    given, say = assignment.ds_config, partial(_note, report)
    world.together(
        lambda: engines.prepare(choice.kind, choice.settings, config.train, given, world.device, say)
    )
    kernels = world.together(lambda: Kernels.of(config, choice.kind, world.device, dtype))
    found = _where_to_start(assignment, world, report)
    begun = _initial(assignment, world, dtype, report)
    built = world.together(lambda: _build(assignment, world, choice, dtype, begun))
    cut = fitted(Situation(assignment, world, choice, sizes, memory, built, report))
    kernels.put_into(built.base, built.blocks)  # no kernel has to run where memory is only foreseen
    report("note", {"text": kernels.describe(built.base)})
    flops = Flops.of(built)
    tracking = world.together(lambda: _open_tracking(assignment, world, found, report))
    engine = engines.build(choice.kind, _task(assignment, world, choice, built, cut, report))
    saver = _saver(assignment, world, engine, built, report, orders.pulse.lives)
    progress = Progress()
    if found is not None:
        path, manifest = found
        reader = Reader(path, manifest)
        _require_same_parameters(built, reader)
        engine.load(reader, manifest.updates)
        progress = Progress.of(manifest.progress)
        report("note", {"text": f"resuming from the checkpoint of step {progress.step}"})
    elif config.checkpoint.rehearse:
        report("note", {"text": saver.rehearse(Label(0, asdict(progress), None))})
    report(
        "start",
        {
            "step": progress.step,
            "total_steps": plan.total_steps,
            "world_size": world.size,
        },
    )
    utilisation = Utilisation(flops, _peak_flops(world))
    profile = _profile(assignment, world, report, orders)
    if progress.step < plan.total_steps:
        share = _share(assignment, world, cut.micro_batch)
        if world.device.type == "cpu":
            allocator.keep_freed_memory()
        hooks = hooks_of(assignment, world, engine, saver, tracking, report, orders, utilisation, profile)
        try:
            train(
                config=config,
                plan=plan,
                world=world,
                engine=engine,
                objective=OBJECTIVES[config.objective.kind],
                batches=lambda step: open_stream(assignment.store, share, range(step, plan.total_steps)),
                eval_batches=_eval_batches(assignment, world, cut.micro_batch),
                hooks=replace(hooks, log=looked_after(cut, world.device, hooks.log, say)),
                progress=progress,
                sources=Sources.of(assignment.store),
            )
            orders.pulse.rests()
        except UserError:  # on all ranks alike: what is being written is worth waiting for
            profile.end()
            saver.close()
            if tracking is not None:
                tracking.close()
            raise
        profile.end()
        saver.close()
    stopped = progress.step < plan.total_steps
    try:
        final_bytes = 0 if stopped else _save_final(assignment, world, built, progress, report).size
    finally:
        if tracking is not None:
            tracking.close()
    world.barrier()
    return Outcome(
        progress=asdict(progress),
        peak_memory_mib=tuple(world.gather(peak_memory_mib(world.device))),
        engine=choice.kind,
        trainable=built.trainable,
        final_bytes=final_bytes,
        stopped=stopped,
        num_workers=world.size,
    )


def _note(report: Report, text: str) -> None:
    report("note", {"text": text})


# ------------------------------------------------------------------------------------------- building it


def _common_dtype(assignment: Assignment, world: World) -> torch.dtype:
    """What all ranks can compute in."""
    dtypes = set(world.gather(compute_dtype(assignment.model.dtype, world.device)))
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _sizes(assignment: Assignment, world: World, dtype: torch.dtype) -> Sizes:
    base, optim = assignment.base, assignment.config.train.optim
    return Sizes(base.frozen_bytes(dtype.itemsize), base.trainable, optim, world.device.type == "cuda")


def _initial(assignment: Assignment, world: World, dtype: torch.dtype, report: Report) -> Initial | None:
    """What the adapter begins with, where that is not drawn; rank 0 makes it, once a run. A collective.

    Raises:
        UserError: it can't be made.
    """
    config, folder = assignment.config, assignment.run.initial
    if not initial.is_needed(config.adapter):
        return None

    def make() -> None:
        if not world.is_main or initial.is_made_for(folder, assignment.beginning):
            return
        report("note", {"text": f"making what the adapter begins with, kept in {folder}"})
        share = _share(assignment, world, busy_packs(assignment.store.manifest.seq_len, world.device))
        batches = read(assignment.store, "train", share, range(share.order.steps_per_epoch))
        begun = initial.make(
            assignment.model,
            assignment.adapter,
            config.run.seed,
            assignment.base.revision,
            lambda: (batch for step in batches for batch in step),
            dtype,
            world.device,
        )
        initial.keep(begun, folder, assignment.beginning)

    world.together(make)
    return world.together(lambda: Initial.read(folder))


def _build(
    assignment: Assignment,
    world: World,
    choice: Choice,
    dtype: torch.dtype,
    begun: Initial | None,
) -> Built:
    config, base = assignment.config, assignment.base
    if base.revision is None and _fingerprint_here(assignment.model.name) != base.fingerprint:
        raise UserError(
            f"model.name = {assignment.model.name}: on node {platform.node()} other files lie there than on the node "
            "that the run was started from, or none. Use a path that all nodes share, or the same files on all of them."
        )
    return build(
        assignment.model,
        assignment.adapter,
        seed=config.run.seed,
        dtype=dtype,
        trained_dtype=engines.trained_dtype(choice.kind, dtype),
        autocast=engines.wants_autocast(choice.kind),
        revision=base.revision,
        initial=begun,
        device=world.device,
    )


def _fingerprint_here(folder: str) -> str | None:
    try:
        return fingerprint(Path(folder))
    except OSError:
        return None


def _task(
    assignment: Assignment, world: World, choice: Choice, built: Built, cut: Cut, report: Report
) -> engines.Task:
    train, plan = assignment.config.train, assignment.plan
    share = _share(assignment, world, cut.micro_batch)

    def record(values: dict[str, Any]) -> None:
        if world.is_main:
            storage.write_json(assignment.run.ds_config, values)

    return engines.Task(
        built=built,
        train=train,
        engine=choice.settings,
        world=world,
        micro_batch=share.micro_batch,
        accumulation=len(list(share.micro_batches())),
        total_steps=plan.total_steps,
        warmup_steps=warmup_steps(train, plan.total_steps),
        given=assignment.ds_config,
        say=partial(_note, report),
        record=record,
    )


# ------------------------------------------------------------------------------------- where it stands


def _where_to_start(assignment: Assignment, world: World, report: Report) -> tuple[str, Manifest] | None:
    """The newest checkpoint that verifies. A collective.

    Raises:
        UserError: it was made with another model, data set, seed ...
    """
    root = assignment.run.checkpoints
    found = checkpoint.newest(root, world, lambda text: report("warning", {"text": text}))
    if found is not None:
        require_same_run(assignment, found[1])
    return found


def _state_shapes(built: Built) -> dict[str, list[int]]:
    remembered = built.allocation.shapes if built.allocation is not None else {}
    return engines.state_shapes(built.trained, remembered)


def _require_same_parameters(built: Built, reader: Reader) -> None:
    """Refuses the checkpoint of another model or adapter.

    Raises:
        UserError: names or shapes differ.
    """
    expected, found = _state_shapes(built), reader.shapes
    changed = [n for n in expected if n in found and list(found[n]) != expected[n]]
    missing = [n for n in expected if n not in found]
    foreign = [n for n in found if n not in expected]
    if changed or missing or foreign:
        lines = ["the checkpoint is of another model or adapter:"]
        lines += [f"  {n}: {list(found[n])} there, {expected[n]} here" for n in changed[:3]]
        lines += [f"  {n}: not in the checkpoint" for n in missing[:3]]
        lines += [f"  {n}: in the checkpoint only" for n in foreign[:3]]
        lines.append(
            "Take the model and adapter settings it was made with, or another run.name to start anew."
        )
        raise UserError("\n".join(lines))


# ---------------------------------------------------------------------------------------- what it uses


def _open_tracking(
    assignment: Assignment, world: World, found: tuple[str, Manifest] | None, report: Report
) -> Tracking | None:
    """On rank 0 alone."""
    if not world.is_main:
        return None
    return Tracking(
        assignment.run,
        assignment.config.tracking.to,
        assignment.config.model_dump(mode="json"),
        last_step=found[1].step if found else -1,
        warn=lambda text: report("warning", {"text": text}),
        group=assignment.group,
    )


def _share(assignment: Assignment, world: World, micro_batch: int, order: Order | None = None) -> Share:
    """The rank's part of the training data, or of that of another order."""
    order = order or assignment.plan.order
    largest_share = len(order.slots(0, world.size))
    return Share(order, world.rank, world.size, min(micro_batch, largest_share))


def _eval_batches(
    assignment: Assignment, world: World, micro_batch: int
) -> Callable[[], Iterator[list[Batch]]] | None:
    store = assignment.store
    if store.manifest.eval.num_packs == 0:
        return None
    order = store.order("eval", EVAL_BATCH, seed=None)
    share = _share(assignment, world, micro_batch, order)
    return lambda: read(store, "eval", share, range(order.steps_per_epoch))


def _profile(assignment: Assignment, world: World, report: Report, orders: Orders) -> Profile:
    window, total = assignment.config.train.profile, assignment.plan.total_steps
    if window is not None and window[0] > total:
        text = f"train.profile = {list(window)}: the run has {total} steps, so none of them is profiled"
        report("warning", {"text": text})
    if window is not None and window[1] - window[0] >= PROFILED_STEPS:
        # What is remembered of each step lies in memory until the last.
        window = (window[0], window[0] + PROFILED_STEPS - 1)
        report(
            "note", {"text": f"train.profile: the first {PROFILED_STEPS} steps, {list(window)}, are profiled"}
        )
    return Profile(
        window,
        assignment.run,
        world,
        peak_memory_mib=lambda: peak_memory_mib(world.device),
        note=partial(_note, report),
        warn=lambda text: report("warning", {"text": text}),
        resting=orders.pulse.resting,
    )


def _saver(
    assignment: Assignment,
    world: World,
    engine: engines.Engine,
    built: Built,
    report: Report,
    lives: Callable[[], None],
) -> Saver:
    def done(written: Written) -> None:
        report("checkpoint", {"step": written.label.step, **asdict(written)})

    return Saver(
        root=assignment.run.checkpoints,
        config=assignment.config.checkpoint,
        identity=assignment.identity,
        engine=engine,
        shapes=_state_shapes(built),
        world=world,
        done=done,
        warn=lambda text: report("warning", {"text": text}),
        lives=lives,
    )


def _peak_flops(world: World) -> float | None:
    """Of all workers together; None if it is not known of one of them."""
    peaks = world.gather(peak_flops(world.device))
    return None if None in peaks else sum(peaks)


# --------------------------------------------------------------------------------------- what it leaves


def _save_final(
    assignment: Assignment, world: World, built: Built, progress: Progress, report: Report
) -> Final:
    """Makes final/ from the last checkpoint.

    Raises:
        UserError: that checkpoint could not be written.
    """
    config, run = assignment.config, assignment.run
    path = catalog.directory(run.checkpoints, progress.step)
    try:
        reader = Reader(path, checkpoint.verify(path, world))
    except catalog.CheckpointError as error:
        raise UserError(
            f"all steps are done, but their checkpoint is not complete: {error}\nMake room under run.storage; the same "
            f"command with run.name={run.name} goes on from the one before."
        ) from error
    report("note", {"text": f"writing {run.final}"})
    data = assignment.store.manifest
    card = model_card(
        config,
        data.fingerprint,
        data.train.num_docs,
        asdict(progress),
        built.trainable,
        assignment.lineage,
    )
    tokenizer = copy.copy(world.together(lambda: load_tokenizer(assignment.tokenizer)))
    tokenizer.chat_template = as_trained(tokenizer, config.data.thinking)
    try:
        final = save_final(
            run,
            assignment.model,
            assignment.adapter,
            reader,
            tokenizer,
            built.module.dtype,
            card,
            world,
            assignment.base.revision,
            config.run.seed,
        )
    except ExportError as error:
        raise UserError(
            f"all steps are done, but {run.final} can't be saved: {error}\nThe checkpoint of step "
            f"{progress.step} stays, and the same command with run.name={run.name} saves it again."
        ) from error
    if (text := describe(final)) is not None:
        report("warning", {"text": text})
    return final


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this rank has held so far, in MiB: of its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / (1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
