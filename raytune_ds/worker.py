"""One worker from its start to its end: builds what the loop needs, finds where the run stands, trains, saves.

No Ray here: a benchmark or a debugger runs a worker in its own process.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from raytune_ds import checkpoint, engines
from raytune_ds.checkpoint import Manifest, Reader
from raytune_ds.config import Config, ModelConfig
from raytune_ds.data.batch import Batch, read
from raytune_ds.data.order import Order
from raytune_ds.data.share import Share
from raytune_ds.data.store import Store
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.export import save_final
from raytune_ds.loop import Hooks, Plan, Progress, Row, train
from raytune_ds.model import adapters
from raytune_ds.model.load import compute_dtype, load_model, parts
from raytune_ds.model.packed import PackedLM
from raytune_ds.objectives import OBJECTIVES
from raytune_ds.rundir import RunDir
from raytune_ds.tracking import Tracking
from raytune_ds.world import World

T = TypeVar("T")

Report = Callable[[str, dict[str, Any]], None]
"""Tells the outside what happens: a kind (step, eval, note, warning, checkpoint) and its content."""

OpenStream = Callable[[Store, Share, range], Iterator[list[Batch]]]
"""How the batches of some steps come to this worker."""

# A forward pass on the CPU or a GPU is busy enough with this many tokens; more only takes memory.
AUTO_MICRO_BATCH_TOKENS = 8192
EVAL_BATCH = 16
# Keys of `train` that a run may be continued with another value of. With more steps the schedule stretches.
MAY_CHANGE = (
    "num_train_epochs",
    "max_steps",
    "micro_batch",
    "activation_checkpointing",
    "eval_steps",
    "logging_steps",
)


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told.

    Attributes:
        config: resolved.
        model: the same as config.model, with a tiny model's directory in place of its name.
        tokenizer: of the model.
        store: prepared.
        run: its directory.
    """

    config: Config
    model: ModelConfig
    tokenizer: TokenizerSpec
    store: Store
    run: RunDir

    @property
    def plan(self) -> Plan:
        """How long the run is."""
        config = self.config
        return Plan.of(config, self.store.order("train", config.train.global_batch, config.run.seed))

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on from a checkpoint."""
        config = self.config
        return {
            "run.seed": config.run.seed,
            "model.name": self.model.name,
            "model.dtype": self.model.dtype,
            "adapter": config.adapter.model_dump(mode="json") if config.adapter.kind != "none" else None,
            "objective": config.objective.model_dump(mode="json"),
            "data": self.store.manifest.fingerprint,
            "train": config.train.model_dump(mode="json", exclude=set(MAY_CHANGE)),
        }


@dataclass(frozen=True)
class Outcome:
    """How a worker ended.

    Attributes:
        error: what the user has to mend; None if all went well.
        progress: where the run stands.
        peak_memory_mib: the most memory each rank held: of the GPU, or the process.
    """

    error: str | None = None
    progress: dict[str, Any] | None = None
    peak_memory_mib: tuple[float, ...] = ()
    trainable: int = 0
    final_bytes: int = 0


def run_worker(assignment: Assignment, world: World, open_stream: OpenStream, report: Report) -> Outcome:
    """Trains this rank's share of the run, from where its newest checkpoint left it."""
    # A mistake of the user's is returned, not raised: raised, it would look like a crash and be tried again. All ranks
    # hear of it after each step, so that none waits for another in a collective that never comes.
    module, problem = _attempt(lambda: _build_module(assignment, world), world)
    if module is None:
        return Outcome(error=problem)
    found, problem = _attempt(lambda: _where_to_start(assignment, world, report), world)
    if problem:
        return Outcome(error=problem)
    tracking, problem = _attempt(lambda: _open_tracking(assignment, world, found, report), world)
    if problem:
        return Outcome(error=problem)
    engine = engines.build(assignment.config.engine.kind, module, assignment.config.train, world)
    progress = Progress()
    if found is not None:
        path, manifest = found
        reader = Reader(path, manifest)
        _, problem = _attempt(lambda: engine.load_state(reader, reader.names), world)
        if problem:
            return Outcome(error=problem)
        progress = Progress(**manifest.progress)
        report("note", {"text": f"resuming from the checkpoint of step {progress.step}"})
    return _train_and_save(assignment, world, engine, progress, tracking, open_stream, report)


def _differences(key: str, there: Any, here: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in here:
            yield from _differences(f"{key}.{name}".lstrip("."), there.get(name), here[name])
    elif there != here:
        yield f"  {key}: {there} then, {here} now"


def _attempt(action: Callable[[], T], world: World) -> tuple[T | None, str | None]:
    """What `action` returns, or the first rank's UserError as text, the same on all ranks."""
    result = error = None
    try:
        result = action()
    except UserError as problem:
        error = str(problem)
    errors = [text for text in world.gather(error) if text]
    return (None, errors[0]) if errors else (result, None)


def _train_and_save(
    assignment: Assignment,
    world: World,
    engine: engines.Engine,
    progress: Progress,
    tracking: Tracking | None,
    open_stream: OpenStream,
    report: Report,
) -> Outcome:
    config, store = assignment.config, assignment.store
    plan = assignment.plan
    share = _share(plan.order, world, config, store)
    report("start", {"step": progress.step, "total_steps": plan.total_steps, "world_size": world.size})
    module = engine.module
    assert isinstance(module, PackedLM)
    final_bytes = 0
    if progress.step < plan.total_steps:
        train(
            config=config,
            plan=plan,
            world=world,
            engine=engine,
            objective=OBJECTIVES[config.objective.kind],
            batches=open_stream(store, share, range(progress.step, plan.total_steps)),
            eval_batches=_eval_batches(store, world, config),
            hooks=_hooks(assignment, world, engine, tracking, report),
            progress=progress,
        )
    if world.is_main:
        report("note", {"text": f"writing {assignment.run.final}"})
        tokenizer = load_tokenizer(assignment.tokenizer)
        dtype = compute_dtype(assignment.model.dtype, world.device)
        final_bytes = save_final(assignment.run, module.model, tokenizer, dtype)
    if tracking is not None:
        tracking.close()
    world.barrier()
    return Outcome(
        progress=asdict(progress),
        peak_memory_mib=tuple(world.gather(peak_memory_mib(world.device))),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        final_bytes=final_bytes,
    )


def _build_module(assignment: Assignment, world: World) -> PackedLM:
    config = assignment.config
    dtype = compute_dtype(assignment.model.dtype, world.device)
    # All parameters are trained in float32, so they are loaded in it; the computation is in `dtype` all the same.
    held_in = torch.float32 if config.adapter.kind == "none" else dtype
    base = load_model(assignment.model, held_in, world.device)
    decoder, head = parts(base)
    if _checkpoints_activations(config, world):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(config.run.seed)  # the same initial adapter on every rank
    model: nn.Module = adapters.apply(base, config.adapter)
    return PackedLM(model, decoder, head, dtype)


def _checkpoints_activations(config: Config, world: World) -> bool:
    wanted = config.train.activation_checkpointing
    return wanted == "full" or (wanted == "auto" and world.device.type == "cuda")


def _where_to_start(assignment: Assignment, world: World, report: Report) -> tuple[str, Manifest] | None:
    """The newest checkpoint that verifies. A collective: rank 0 looks, so that all ranks start from the same one.

    Raises:
        UserError: it was made with another model, data set, seed ...
    """
    root = assignment.run.checkpoints
    found = checkpoint.newest(root, lambda text: report("warning", {"text": text})) if world.is_main else None
    path: str | None = world.broadcast(found[0] if found else None)
    if path is None:
        return None
    manifest = found[1] if found else checkpoint.read_manifest(path)
    require_same_run(assignment, manifest)
    return path, manifest


def require_same_run(assignment: Assignment, manifest: Manifest) -> None:
    """Refuses to go on from a checkpoint that was made with other settings.

    Raises:
        UserError: naming each difference.
    """
    changed = list(_differences("", manifest.identity, assignment.identity))
    if changed:
        name = assignment.run.path.rpartition("/")[2]
        raise UserError(
            f"run.name = {name}: this run was begun with other settings:\n"
            + "\n".join(changed)
            + "\nSet them back to resume it, or choose another run.name to start anew."
        )


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
    )


def _share(order: Order, world: World, config: Config, store: Store) -> Share:
    largest_share = len(order.slots(0, world.size))
    wanted = config.train.micro_batch
    micro_batch = max(1, AUTO_MICRO_BATCH_TOKENS // store.manifest.seq_len) if wanted == "auto" else wanted
    return Share(order, world.rank, world.size, min(micro_batch, largest_share))


def _eval_batches(store: Store, world: World, config: Config) -> Callable[[], Iterator[list[Batch]]] | None:
    if store.manifest.eval.num_packs == 0:
        return None
    order = store.order("eval", EVAL_BATCH, seed=None)
    share = _share(order, world, config, store)
    return lambda: read(store, "eval", share, range(order.steps_per_epoch))


def _hooks(
    assignment: Assignment,
    world: World,
    engine: engines.Engine,
    tracking: Tracking | None,
    report: Report,
) -> Hooks:
    config, root = assignment.config, assignment.run.checkpoints

    def log(row: Row) -> None:
        is_eval = "eval_loss" in row
        if tracking is not None:
            tracking.log(row, plot=is_eval or row["step"] % config.train.logging_steps == 0)
        report("eval" if is_eval else "step", row)

    def save(step: int, progress: Progress) -> None:
        started = time.perf_counter()
        if tracking is not None:
            tracking.flush()
        path = checkpoint.save(root, step, engine.state(), assignment.identity, asdict(progress), world)
        if world.is_main:
            checkpoint.prune(root, config.checkpoint.keep, newest=step)
        report("checkpoint", {"step": step, "path": path, "seconds": time.perf_counter() - started})

    return Hooks(log=log, checkpoint=save)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this rank has held so far, in MiB: of its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / (1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
