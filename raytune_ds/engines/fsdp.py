"""FSDP2: torch's `fully_shard`. Every rank keeps a part of each parameter, its gradient and its optimizer state, and
gathers one transformer block at a time to compute with it.

Gradients are summed over the ranks in each backward pass, so that a rank never holds more than its part of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from raytune_ds.engines import Piece, StepResult, Task
from raytune_ds.engines.adamw import local
from raytune_ds.engines.eightbit import adamw_of
from raytune_ds.model.weights import Read


class FsdpEngine:
    """See the module."""

    def __init__(self, task: Task) -> None:
        """Shards the module while it has no weights; each rank then reads its own part of each parameter."""
        self.module: nn.Module = task.built.module
        self._world = task.world
        task.world.require_group()
        _shard(task)
        device = task.world.device
        _allocate(self.module, torch.device("cpu") if _offloads(task) else device, device)
        for name, parameter in self.module.named_parameters():
            _read_part(local(parameter.detach()), parameter, name, task.built.read)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._rows_before = {name: _first_row(parameter) for name, parameter in trained.items()}
        self._adamw = adamw_of(trained, task.train, task.built.lr_scales)

    @property
    def updates(self) -> int:
        """See Engine."""
        return self._adamw.updates

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        loss.backward()

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        """See Engine."""
        for parameter in self._adamw.parameters.values():
            if parameter.grad is None:  # it took no part, as an expert without tokens: a gradient of zero
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local(p.grad) for p in self._adamw.parameters.values() if p.grad is not None]
        squares = sum((torch.linalg.vector_norm(g).double() ** 2 for g in gradients), torch.zeros(()))
        (total,) = self._world.sum(squares)
        result = self._adamw.apply(gradients, math.sqrt(total), lr, wanted)
        for parameter in self._adamw.parameters.values():
            parameter.grad = None
        return result

    def pieces(self) -> Iterator[Piece]:
        """See Engine."""

        def share(name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
            return 0, tensor.numel(), self._rows_before[name] * math.prod(tensor.shape[1:])

        return self._adamw.pieces(share)

    def load(self, read: Read, updates: int) -> None:
        """See Engine."""
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # what an evaluation left gathered would be computed with once more

        def write(part: torch.Tensor, kind: str, name: str) -> None:
            _read_part(part, self._adamw.parameters[name], f"{kind}/{name}", read)

        self._adamw.load(write, updates)


def _offloads(task: Task) -> bool:
    return task.engine.offload == "parameters"


def _shard(task: Task) -> None:
    """One unit a transformer block; the rest (embedding, head, last norm) is the root's, gathered for a whole pass."""
    module, device = task.built.module, task.world.device.type
    compute = module.dtype
    how: dict[str, Any] = {
        "mesh": init_device_mesh(device, (task.world.size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        # Pinned memory is a matter of CUDA.
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda")
        if _offloads(task)
        else OffloadPolicy(),
    }
    for unit in (*task.built.blocks, module):
        fully_shard(unit, **how)
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # A sum and not a mean, and by SUM: gloo and others have no scaled reductions.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # A parameter may take part on one rank and not on another (an expert); all must reduce the same ones.
            unit.set_reduce_scatter_unused_params(True)


def _allocate(module: nn.Module, parameters: torch.device, buffers: torch.device) -> None:
    """Memory for this rank's parts; buffers, which every rank has whole, keep their values."""
    values = [buffer.clone() for buffer in module.buffers()]
    module.to_empty(device=parameters)
    for buffer, value in zip(module.buffers(), values, strict=True):
        buffer.data = value.to(buffers)


def _first_row(parameter: torch.Tensor) -> int:
    """How many rows of a parameter the ranks before this one have: as torch.chunk cuts it."""
    assert isinstance(parameter, DTensor)
    rank, size = parameter.device_mesh.get_local_rank(), parameter.device_mesh.size()
    return min(parameter.shape[0], rank * -(-parameter.shape[0] // size))


def _read_part(part: torch.Tensor, parameter: torch.Tensor, name: str, read: Read) -> None:
    start = _first_row(parameter) * math.prod(parameter.shape[1:])
    if part.numel():
        part.copy_(read(name, start, start + part.numel()).view_as(part))
