"""torch's AdamW over the part of each trained parameter that a rank keeps: what ddp and fsdp share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raytune_ds.config import TrainConfig
from raytune_ds.engines import MOMENTS, Piece, StepResult


class AdamW:
    """The optimizer and its state, whose moments are there from the beginning: a first checkpoint is a whole one."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        lr_scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Makes it.

        Args:
            parameters: by name; whole, or sharded as torch's DTensor.
            config: the optimizer's settings.
            lr_scales: factors of the learning rate of some parameters.
        """
        self.parameters = parameters
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = self._make(config, lr_scales)

    def _make(self, config: TrainConfig, lr_scales: Mapping[str, float]) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(
            groups_of(self.parameters, config.weight_decay, lr_scales), **adamw_settings(config)
        )
        for parameter in self.parameters.values():
            made.state[parameter] = {
                "step": torch.zeros((), device=local(parameter).device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
        return made

    @property
    def updates(self) -> int:
        """Steps applied."""
        return max((int(state["step"]) for state in self._optimizer.state.values()), default=0)

    def apply(
        self, gradients: Iterable[torch.Tensor], grad_norm: float, lr: float, wanted: bool
    ) -> StepResult:
        """Clips `gradients`, which the parameters' are made of and whose norm over all ranks is given, and steps.

        Nothing happens if they are not finite, or not wanted.
        """
        applied = wanted and math.isfinite(grad_norm)
        if applied:
            if 0 < self._max_grad_norm < grad_norm:
                for gradient in gradients:
                    gradient.mul_(self._max_grad_norm / grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self._optimizer.step()
        return StepResult(grad_norm, skipped=not applied)

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind of state, parameter, the part that is here) of all state."""
        for name, parameter in self.parameters.items():
            yield "model", name, local(parameter.detach())
            for moment in MOMENTS:
                yield moment, name, local(self._optimizer.state[parameter][moment])

    def pieces(self, share: Callable[[str, torch.Tensor], tuple[int, int, int]]) -> Iterator[Piece]:
        """All state as pieces.

        Args:
            share: (first, last, start) of a parameter's part that is here: which of its elements this rank hands out,
                and where in the whole parameter the first of them is.
        """
        for kind, name, tensor in self.state():
            first, last, start = share(name, tensor)
            if first < last:
                yield Piece(f"{kind}/{name}", start, tensor.reshape(-1)[first:last])

    def load(self, write: Callable[[torch.Tensor, str, str], None], updates: int) -> None:
        """Overwrites all state: `write` puts the values of (kind of state, parameter) into the part that is here."""
        for kind, name, tensor in self.state():
            write(tensor, kind, name)
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adamw_settings(config: TrainConfig) -> dict[str, Any]:
    """AdamW's keyword arguments."""
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon, "fused": True}


def groups_of(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    lr_scales: Mapping[str, float] = MappingProxyType({}),
    ndim: Callable[[nn.Parameter], int] = torch.Tensor.dim,
) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for norms and biases, as the Hugging Face trainer has it.

    Args:
        parameters: by name.
        weight_decay: of matrices.
        lr_scales: factors of the learning rate of some of them; a group's is its `lr_scale`.
        ndim: the number of dimensions of a whole parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = weight_decay if ndim(parameter) >= 2 else 0.0
        groups.setdefault((decay, lr_scales.get(name, 1.0)), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), members in groups.items()
    ]
