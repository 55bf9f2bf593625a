"""The processes that train together, and the few things they tell each other outside the gradients."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from raytune_ds.errors import UserError
from raytune_ds.phases import phase

T = TypeVar("T")


_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def _available_memory() -> int:
    """Bytes free on this node, or what its container may use."""
    free = int(psutil.virtual_memory().available)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(free, int(limit)) if limit.isdigit() else free


@dataclass(frozen=True)
class World:
    """A process's place among the ranks.

    Attributes:
        rank: from 0.
        size: number of ranks; with 1 no process group is needed.
        device: where this rank computes.
        group: the process group; None is the one that torch was started with.
        timeout_s: after which ranks that wait for others in a group made here give up.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    timeout_s: float = 1800.0

    @staticmethod
    def alone(device: str = "cpu") -> World:
        """One process, no group."""
        return World(0, 1, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def least_memory(self) -> int:
        """Bytes that the rank with the least memory has: of its GPU, or its share of its node's. A collective."""
        if self.device.type == "cuda":
            return int(min(self.gather(torch.cuda.get_device_properties(self.device).total_memory)))
        nodes = self.gather((platform.node(), _available_memory()))
        names = [name for name, _ in nodes]
        return int(min(available // names.count(name) for name, available in nodes))

    def require_group(self) -> None:
        """Makes the process group of one that a sharding engine wants of a process alone."""
        if not dist.is_initialized():
            assert self.size == 1
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
            )

    def apart(self) -> World:
        """The same ranks in a group of their own on the CPU, whose collectives do not mix with those of this one."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        return replace(self, device=torch.device("cpu"), group=group)

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """The sum over all ranks of each value, in float64, in one collective."""
        # MPS and some other devices have no float64, so a single process never moves the numbers there.
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.size > 1:
            total = total.to(self.device)
            with phase("collective"):
                dist.all_reduce(total, group=self.group)
        return [float(v) for v in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], T], mistakes: tuple[type[Exception], ...] = (UserError,)) -> T:
        """What `action` returns. If it fails on one rank it fails on all, so that none waits for another for ever.

        Args:
            action: something that has no collectives.
            mistakes: what it may raise.

        Raises:
            UserError: the first rank's mistake.
        """
        results: list[T] = []
        error = None
        try:
            results.append(action())
        except mistakes as problem:
            error = str(problem)
        if errors := [text for text in self.gather(error) if text]:
            raise UserError(errors[0])
        return results[0]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        device = self.device if self.device.type == "cuda" else None
        dist.broadcast_object_list(box, src=0, device=device, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)
