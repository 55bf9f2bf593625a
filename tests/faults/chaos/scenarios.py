"""What is done to which run, and when; all of it follows from a seed."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

ENGINES: dict[str, tuple[str, ...]] = {
    "ddp lora": ("engine.kind=ddp", "adapter.r=4"),
    "zero2 full": ("engine.kind=zero", "engine.stage=2", "adapter.kind=none"),
    "fsdp full": ("engine.kind=fsdp", "adapter.kind=none"),
}
KINDS = ("worker", "node", "driver", "mid-checkpoint", "mid-fetch", "head")
SETTINGS = (
    "model.name=tiny:qwen2",
    "data.seq_len=64",
    "data.eval.fraction=0.1",
    "train.eval_steps=20",
    "train.max_steps=60",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.learning_rate=1e-4",
    "checkpoint.every_steps=5",
    "scaling.resize_interval_s=5",
    "tracking.to=[]",
)
STEPS = 60
ROWS = [
    {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
    for i in range(80)
]


@dataclass(frozen=True)
class Scenario:
    """One run and its misfortune.

    Attributes:
        seed: that it follows from.
        kind: one of KINDS; those that begin with "mid-" say when, the others what is killed.
        engine: one of ENGINES.
        victim: what is killed: worker, node, driver, head, or fetch, the process that reads a batch.
        rank: of the worker, or the number of the node, modulo what there is.
        after: the step, or the number of the checkpoint, that it happens at; 1 or 2 for the first fetch of the first
            workers, or of those that replace them.
        elastic: whether the run may go on with fewer workers, and has to, for no node is to spare.
    """

    seed: int
    kind: str
    engine: str
    victim: str
    rank: int
    after: int
    elastic: bool

    @property
    def num_workers(self) -> str:
        """As an override."""
        return f"scaling.num_workers={'[1,2]' if self.elastic else '2'}"

    def __str__(self) -> str:
        when = {"mid-checkpoint": "in checkpoint", "mid-fetch": "in fetch"}.get(self.kind, "after step")
        which = {
            "mid-fetch": "of its workers" if self.after == 1 else "of workers that replace dead ones"
        }.get(self.kind, self.after)
        return f"{self.victim} {when} {which}{', no spare node' * self.elastic}"


def scenarios(number: int, seed: int) -> list[Scenario]:
    """The first `number` scenarios of a seed: each kind on each engine before any comes again."""
    pairs = sorted(itertools.product(KINDS, ENGINES), key=lambda pair: pair[0] == "head")
    cases = itertools.islice(itertools.cycle(pairs), number)
    return [_scenario(seed + index, *pair) for index, pair in enumerate(cases)]


def _scenario(seed: int, kind: str, engine: str) -> Scenario:
    draw = random.Random(seed)
    after = draw.randrange(6, 50)
    victim, elastic = kind, False
    if kind == "mid-checkpoint":
        victim, after = draw.choice(["worker", "node", "driver"]), draw.randrange(1, 9)
    elif kind == "mid-fetch":
        victim, after = draw.choice(["fetch", "worker", "node"]), draw.randrange(1, 3)
    if victim == "node":
        elastic = draw.random() < 0.5
    return Scenario(seed, kind, engine, victim, draw.randrange(2), after, elastic)
