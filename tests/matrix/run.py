"""Runs cases in real processes with a real process group: one set of processes for all cases of a world size."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytune_ds.model import crossentropy
from tests.matrix.cases import ACCUMULATION, STEPS, TRAIN, Case, Trace, lr, micro_batches


def run(cases: Sequence[Case], models: dict[str, Path]) -> list[Trace]:
    """The trace of each case, world size after world size, in the order of the cases."""
    traces: dict[Case, Trace] = {}
    for world, group in groupby(sorted(cases, key=lambda case: case.world), key=lambda case: case.world):
        same = list(group)
        with tempfile.TemporaryDirectory() as scratch:
            mp.spawn(_process, (world, free_port(), same, models, scratch), nprocs=world)
            traces |= {
                c: torch.load(Path(scratch) / f"{i}.pt", weights_only=False) for i, c in enumerate(same)
            }
    return [traces[case] for case in cases]


def halves(pairs: Sequence[tuple[Case, Case]], root: Path) -> tuple[list[Case], list[Case]]:
    """What `run` is given, in this order, for second halves that go on from the checkpoints of others' first halves.

    Args:
        pairs: (who saves in the middle, who goes on); one that goes on has no fewer workers.
        root: of the checkpoints.

    Returns:
        Each that saves, once; the one that goes on of each pair.
    """
    middle = STEPS // 2
    where = {case: str(root / str(number)) for number, case in enumerate(dict.fromkeys(a for a, _ in pairs))}
    first = [replace(case, stop=middle, save=folder) for case, folder in where.items()]
    then = [replace(b, start=f"{where[a]}/step-{middle:08d}", start_step=middle) for a, b in pairs]
    return first, then


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _process(
    rank: int, world: int, port: int, cases: list[Case], models: dict[str, Path], scratch: str
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    crossentropy.ROOM["cpu"] = crossentropy.Room(1 << 30, tokens=16)  # ranks need unequal numbers of chunks
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for index, case in enumerate(cases):
        trace = run_case(case, models[case.model], rank)
        if rank == 0:
            torch.save(trace, Path(scratch) / f"{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_case(case: Case, folder: Path, rank: int) -> Trace:
    """A rank's part of a case; the trace is whole on every rank."""
    from raytune_ds import checkpoint, engines
    from raytune_ds.checkpoint import Reader
    from raytune_ds.config import CheckpointConfig, ModelConfig
    from raytune_ds.loop import optimizer_step
    from raytune_ds.model.build import build
    from raytune_ds.objectives.sft import sft
    from raytune_ds.saver import Label, Saver
    from raytune_ds.world import World

    world = World(rank, case.world, torch.device("cpu"))
    dtype = getattr(torch, case.dtype)
    built = build(
        ModelConfig(name=str(folder), quantization=case.quantization),
        case.adapter,
        seed=0,
        dtype=dtype,
        trained_dtype=engines.trained_dtype(case.settings.kind, dtype),
        autocast=engines.wants_autocast(case.settings.kind),
    )
    built.recompute("every-2" if case.world == 3 else "none")  # another order of collectives
    engine = engines.build(
        case.settings.kind,
        engines.Task(
            built,
            TRAIN,
            case.settings,
            world,
            micro_batch=1,
            accumulation=ACCUMULATION,
            total_steps=STEPS,
            warmup_steps=0,
            given=None if case.given is None else json.loads(case.given),
        ),
    )
    if case.start is not None:
        manifest = checkpoint.verify(case.start, world)
        engine.load(Reader(case.start, manifest), manifest.updates)
    losses = []
    for step in range(case.start_step, case.stop):
        losses.append(
            optimizer_step(engine, sft, micro_batches(step, rank, case.world), world, lr(step))["loss"]
        )
    if case.save is not None:
        shapes = engines.state_shapes(built.trained)
        saver = Saver(case.save, CheckpointConfig(), {}, engine, shapes, world, done=_ignore, warn=_fail)
        saver.save(Label(case.stop, {}, None))
        saver.wait()
    return Trace(losses, _weights(engine, built, world))


def _ignore(_: object) -> None:
    pass


def _fail(text: str) -> None:
    raise AssertionError(text)


def _weights(engine: Any, built: Any, world: Any) -> dict[str, torch.Tensor]:
    """All trained weights, put together from the pieces that the ranks hand out."""
    mine = [(p.name, p.start, p.tensor.clone()) for p in engine.pieces() if p.name.startswith("model/")]
    whole = {name: torch.full((shape.numel(),), float("nan")) for name, shape in built.trained.items()}
    for pieces in world.gather(mine):
        for name, start, tensor in pieces:
            whole[name.removeprefix("model/")][start : start + tensor.numel()] = tensor
    return {name: tensor.view(built.trained[name]) for name, tensor in whole.items()}
