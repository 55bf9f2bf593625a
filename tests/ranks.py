"""Ranks without processes: threads that meet where ranks would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from raytune_ds.world import World


@dataclass
class Meeting:
    """Where the threads that play ranks wait for each other; whoever fails lets the others go."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = [self.values[number] for number in range(self.size)]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRank(World):
    """A rank that is a thread of this process."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        ranks = self.meeting.gather(self.rank, [float(value) for value in values])
        return [sum(of_all) for of_all in zip(*ranks, strict=True)]

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def barrier(self) -> None:
        self.gather(None)

    def apart(self) -> World:
        return self


def on_ranks(
    size: int, action: Callable[[World], Any], shared: tuple[type[Exception], ...] = ()
) -> list[Any]:
    """What `action` returns or raises on each of some ranks; `shared` errors are raised by all of them."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadRank(rank, size, torch.device("cpu"), meeting=meeting))
        except Exception as error:
            results[rank] = error
            if not isinstance(error, shared):
                meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
