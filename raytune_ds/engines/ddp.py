"""Data parallel: every rank holds all parameters, and the gradients are summed once an optimizer step.

The gradients live in one flat buffer that `parameter.grad` are views of. So the sum over ranks is one collective
without a copy, its norm is one call, and a parameter that took no part (an expert without tokens) simply has a gradient
of zero. torch's DistributedDataParallel would overlap the collective with the backward pass, at the price of a wrapper
that averages, wants every forward pass to go through it, and has to be told which micro-batch is the last. For
adapters, which are small, there is nothing to overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from raytune_ds.engines import Piece, StepResult, Task
from raytune_ds.engines.eightbit import adamw_of
from raytune_ds.engines.fill import fill, hand_out
from raytune_ds.model.weights import Read
from raytune_ds.phases import phase


class DdpEngine:
    """See the module."""

    def __init__(self, task: Task) -> None:
        """Reads the model on rank 0 and hands it to all."""
        self.module: nn.Module = task.built.module
        self._world = task.world
        fill(self.module, task.built.read, task.world)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._gradient = flat_gradient(trained.values(), task.world.device)
        self._adamw = adamw_of(trained, task.train, task.built.lr_scales)
        self._allocation = task.built.allocation

    @property
    def updates(self) -> int:
        """See Engine."""
        return self._adamw.updates

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        loss.backward()

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        """See Engine."""
        if self._allocation is not None and self._world.is_main:
            self._allocation.add_penalty()
        if self._world.size > 1:
            with phase("collective"):
                dist.all_reduce(self._gradient)
        grad_norm = float(torch.linalg.vector_norm(self._gradient))
        result = self._adamw.apply([self._gradient], grad_norm, lr, wanted)
        if self._allocation is not None and not result.skipped:
            self._allocation.allocate(self.updates)
        self._gradient.zero_()
        return result

    def pieces(self) -> Iterator[Piece]:
        """See Engine. All ranks hold the same, so each hands out as much of every tensor as the others."""
        rank, size = self._world.rank, self._world.size

        def share(name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
            first, last = tensor.numel() * rank // size, tensor.numel() * (rank + 1) // size
            return first, last, first

        yield from self._adamw.pieces(share)
        if self._allocation is not None:
            for name, tensor in self._allocation.state().items():
                first, last, start = share(name, tensor)
                if first < last:
                    yield Piece(name, start, tensor.reshape(-1)[first:last])

    def load(self, read: Read, updates: int) -> None:
        """See Engine."""
        self._adamw.load(lambda t, kind, name: hand_out(t, f"{kind}/{name}", read, self._world), updates)
        if self._allocation is not None:
            state = {n: torch.empty(s, device=self._world.device) for n, s in self._allocation.shapes.items()}
            for name, tensor in state.items():
                hand_out(tensor, name, read, self._world)
            self._allocation.load(state)


def flat_gradient(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """One buffer of zeros for all gradients; each parameter's `grad` becomes a view of it."""
    parameters = list(parameters)
    gradient = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=device)
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return gradient
