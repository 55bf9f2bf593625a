"""Weights into a module that has none yet."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from raytune_ds.model.weights import Read
from raytune_ds.world import World


def fill(module: nn.Module, read: Read, world: World) -> None:
    """Gives every rank all parameters. A collective: rank 0 reads each, one at a time, and hands it to the others."""
    for name, parameter in module.named_parameters():
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        hand_out(value, name, read, world)
        become(parameter, value)
    move_buffers(module, world.device)


def hand_out(target: torch.Tensor, name: str, read: Read, world: World) -> None:
    """Writes all of a tensor to `target` on every rank, read by rank 0 alone. A collective."""
    if world.is_main:
        target.copy_(read(name, 0, target.numel()).view_as(target))
    if world.size > 1:
        dist.broadcast(target, src=0)


def become(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Makes a parameter hold `value` wherever the module uses it, tied weights included."""
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers, which every rank has whole."""
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
