"""Engines: how gradients become an update, and which part of the model lives in which process.

One sentence holds all of the contract: the applied gradient is the sum over ranks and micro-batches of what was passed
to `backward`; each engine undoes its own averaging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from raytune_ds.compatible import conflicts
from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.errors import UserError
from raytune_ds.model.build import Built
from raytune_ds.model.weights import Read
from raytune_ds.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter; a checkpoint has each under `<moment>/<parameter>`, the parameter under `model/`."""


def state_shapes(
    trained: Mapping[str, torch.Size], remembered: Mapping[str, torch.Size] = MappingProxyType({})
) -> dict[str, list[int]]:
    """The shape of every tensor of a checkpoint.

    Args:
        trained: those of the trained parameters.
        remembered: of what else has to be kept, by its name in the checkpoint.
    """
    kinds = ("model", *MOMENTS)
    shapes = {f"{kind}/{name}": list(shape) for kind in kinds for name, shape in trained.items()}
    return shapes | {name: list(shape) for name, shape in remembered.items()}


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: 2-norm of the whole gradient before clipping.
        skipped: the gradient was not finite, or not wanted, so nothing was applied.
    """

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class Piece:
    """A flat range of one tensor of the state: float32 elements from `start` on, in row-major order."""

    name: str
    start: int
    tensor: torch.Tensor


class Engine(Protocol):
    """What the loop and the checkpoints know of an engine.

    Attributes:
        module: what an objective calls: a batch to the losses of its supervised tokens.
        updates: optimizer steps applied so far, which AdamW's bias correction depends on.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def updates(self) -> int: ...

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this rank's share of the global loss."""

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        """Sums the gradient over the ranks, clips it, applies it at learning rate `lr`, and clears it.

        It is not applied if it is not finite, or not `wanted`.
        """

    def pieces(self) -> Iterator[Piece]:
        """The rank's share of the state that a checkpoint keeps; the ranks' shares make the whole, without overlap.

        The tensors are the state itself, not copies.
        """

    def load(self, read: Read, updates: int) -> None:
        """Takes the state back, whichever engine and world wrote it. A collective.

        Args:
            read: any range of any tensor of the state.
            updates: see `updates`.
        """


def _ignore(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Task:
    """What an engine is made for.

    Attributes:
        built: the model.
        train: the optimizer's settings.
        engine: the engine's own.
        world: the ranks.
        micro_batch: packs of a forward pass.
        accumulation: forward passes of a rank in one optimizer step.
        total_steps, warmup_steps: of the run.
        given: the user's own DeepSpeed config.
        say: takes what people should know, a line each.
        record: takes what DeepSpeed is really given.
    """

    built: Built
    train: TrainConfig
    engine: EngineConfig
    world: World
    micro_batch: int
    accumulation: int
    total_steps: int
    warmup_steps: int
    given: dict[str, Any] | None = None
    say: Callable[[str], None] = _ignore
    record: Callable[[dict[str, Any]], None] = _ignore


def trained_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """What an engine wants trained parameters in, if `dtype` is computed in."""
    # DeepSpeed keeps float32 masters of its own beside what it computes with.
    return dtype if kind == "zero" else torch.float32


def wants_autocast(kind: str) -> bool:
    """Whether parameters stay in float32 while the model computes in less; the sharding engines cast them."""
    return kind == "ddp"


def prepare(
    kind: str,
    settings: EngineConfig,
    train: TrainConfig,
    given: dict[str, Any] | None,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Tries what may fail in one process and not in another, before they wait for each other.

    Raises:
        UserError: the engine, or the optimizer, can't run here.
    """
    for reason in conflicts({"train.optim": train.optim, "engine.kind": kind, "device": device.type}):
        raise UserError(reason)
    if kind == "zero":
        from raytune_ds.engines import zero
        from raytune_ds.engines.ds import config as dsconfig

        zero.prepare(dsconfig.check(given, train, settings), device, say)


def build(kind: str, task: Task) -> Engine:
    """The engine of that `engine.kind`, the model's weights in place. A collective.

    Raises:
        UserError: it can't run here.
    """
    return _ENGINES[kind](task)


def _ddp(task: Task) -> Engine:
    from raytune_ds.engines.ddp import DdpEngine

    return DdpEngine(task)


def _fsdp(task: Task) -> Engine:
    from raytune_ds.engines.fsdp import FsdpEngine

    return FsdpEngine(task)


def _zero(task: Task) -> Engine:
    from raytune_ds.engines.zero import ZeroEngine

    return ZeroEngine(task)


_ENGINES: dict[str, Callable[[Task], Engine]] = {"ddp": _ddp, "fsdp": _fsdp, "zero": _zero}
