"""The processes that train together, and the few things they tell each other outside the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """A process's place among the ranks.

    Attributes:
        rank: from 0.
        size: number of ranks; with 1 no process group is needed.
        device: where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def alone(device: str = "cpu") -> World:
        """One process, no group."""
        return World(0, 1, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """The sum over all ranks of each value, in float64, in one collective."""
        # MPS and some other devices have no float64, so a single process never moves the numbers there.
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.size > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()
