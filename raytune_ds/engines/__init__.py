"""Engines: how gradients become an update.

One sentence holds all of the contract: the applied gradient is the sum over ranks and micro-batches of what was passed
to `backward`; each engine undoes its own averaging.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from raytune_ds.config import TrainConfig
from raytune_ds.world import World


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: 2-norm of the whole gradient before clipping.
        skipped: the gradient was not finite, so nothing was applied.
    """

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """What the loop knows of an engine."""

    module: nn.Module

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this rank's share of the global loss."""

    def step(self, lr: float) -> StepResult:
        """Sums the gradient over the ranks, clips it, applies it at learning rate `lr`, and clears it."""

    def state(self) -> dict[str, torch.Tensor]:
        """The rank's share of the state that a checkpoint keeps, by name; the ranks' shares make the whole."""

    def load_state(self, read: Callable[[str], torch.Tensor], names: Mapping[str, torch.Size]) -> None:
        """Takes the state back, whichever engine and world wrote it.

        Args:
            read: the tensor of that name.
            names: all names there are, with shapes.

        Raises:
            UserError: the state is of another model or adapter.
        """


def build(kind: str, module: nn.Module, config: TrainConfig, world: World) -> Engine:
    """The engine of that `engine.kind`."""
    from raytune_ds.engines.ddp import DdpEngine

    # auto has one answer until there are sharded engines.
    engines: dict[str, Callable[[nn.Module, TrainConfig, World], Engine]] = {
        "auto": DdpEngine,
        "ddp": DdpEngine,
    }
    return engines[kind](module, config, world)
