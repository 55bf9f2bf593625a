"""What tests of runs share."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raytune_ds.world import World

Run = Callable[..., Any]
"""Launches a run from overrides; returns its Result."""


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics(run_dir: str) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def step_losses(run_dir: str) -> list[float]:
    """The loss of each optimizer step, each step once and in order."""
    rows = [row for row in metrics(run_dir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


# ---- ranks without processes ----------------------------------------------------------------------


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
            results[rank] = action(ThreadRank(rank, size, torch.device("cpu"), None, meeting))
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
