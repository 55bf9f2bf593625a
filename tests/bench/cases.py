"""What is measured beside what."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from raytune_ds import allocator, early
from tests.bench.peers.case import MLA_TARGETS, TARGETS


@dataclass(frozen=True)
class Peer:
    """A side.

    Attributes:
        name: in the tables.
        module: of tests.bench.peers.
        options: that its module is told.
        needs: the package that it is made of, where that is not ours to have.
        environment: variables that its process begins with.
    """

    name: str
    module: str
    options: dict[str, Any]
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> str | None:
        """The interpreter it runs on; None where it can't run. Some want an environment of their own."""
        if self.needs is None:
            return sys.executable
        own = os.environ.get(f"{self.needs.upper()}_PYTHON")
        return own or (sys.executable if importlib.util.find_spec(self.needs) else None)


def _trl(name: str, batch: int, **arguments: Any) -> Peer:
    return Peer(name, "trlsft", {"batch": batch, "arguments": arguments}, needs="trl")


OURS = Peer("raytune_ds", "ours", {}, environment=allocator.jemalloc(early.JEMALLOC))  # as a worker begins
MATMULS = Peer("its matrix products alone", "matmuls", {})
RECIPE = (
    Peer("transformers.Trainer, batch 4", "recipe", {"batch": 4}),
    Peer("transformers.Trainer, batch 8", "recipe", {"batch": 8}),
)
TRL_BEST = (
    _trl("TRL, no checkpointing", 8, gradient_checkpointing=False),
    _trl(
        "TRL, alike lengths together",
        8,
        gradient_checkpointing=False,
        train_sampling_strategy="group_by_length",
    ),
    _trl("TRL, packing", 1, gradient_checkpointing=False, packing=True),
    _trl("TRL, padding_free", 8, gradient_checkpointing=False, padding_free=True, max_length=None),
)
TRL = (_trl("TRL, defaults", 8), *TRL_BEST)
LLAMAFACTORY = Peer("LLaMA-Factory, batch 8", "llamafactory", {"batch": 8}, needs="llamafactory")
ALL = (OURS, MATMULS, *RECIPE, *TRL, LLAMAFACTORY)
MEMORY = (OURS, *RECIPE, TRL_BEST[2])
FEW = (OURS, MATMULS, RECIPE[0], RECIPE[1], *TRL_BEST[1:3])


@dataclass(frozen=True)
class Comparison:
    """One table.

    Attributes:
        shape: a key of tests.bench.shapes.
        data: a key of tests.bench.corpus.QUANTILES.
        documents: how many a pass is made of.
        lora: the modules that get an adapter; None trains all parameters.
        peers: the sides; ours comes first.
        longest: whether the documents are the longest there are, which decide about memory, or like all of them.
    """

    shape: str
    data: str
    documents: int
    lora: list[str] | None
    peers: tuple[Peer, ...]
    dtype: str = "float32"
    longest: bool = False

    @property
    def name(self) -> str:
        """As people ask for it."""
        kind = "full" if self.lora is None else "lora"
        dtype = [] if self.dtype == "float32" else [self.dtype]
        return "-".join([self.shape, self.data, kind, *dtype, *(["longest"] if self.longest else [])])


COMPARISONS = (
    Comparison("qwen2", "alpaca", 24, TARGETS, ALL),
    Comparison("qwen2", "alpaca", 24, None, FEW),
    Comparison("qwen2", "glaive", 12, TARGETS, FEW),
    Comparison("qwen2", "glaive", 12, None, FEW),
    Comparison("llama-129k", "alpaca", 24, TARGETS, FEW),
    Comparison("qwen2", "alpaca", 8, TARGETS, MEMORY, longest=True),
    Comparison("qwen2", "alpaca", 8, None, MEMORY, longest=True),
    Comparison("llama-129k", "alpaca", 8, TARGETS, MEMORY, longest=True),
    Comparison("deepseek-v3", "alpaca", 24, MLA_TARGETS, FEW),
    Comparison("qwen2-wide", "alpaca", 16, TARGETS, (OURS, MATMULS)),
    Comparison("qwen2-wide", "alpaca", 16, None, (OURS, MATMULS)),
    Comparison("qwen2", "long", 2, TARGETS, FEW),
)
