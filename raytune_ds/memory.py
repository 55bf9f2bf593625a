"""How many packs a worker computes at once, and in how many layers it keeps what the backward pass needs: as its memory
allows, decided before training.

What one pass takes is known from `model/footprint`, what the engine holds from `engines/choose`. Recomputing in all
layers makes a step a third longer, and more packs at once gain little once the hardware is busy: so layers keep what
they can while BUSY_TOKENS fit, and then as many packs are taken as fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch

from raytune_ds import storage
from raytune_ds.assignment import Assignment
from raytune_ds.config import TrainConfig
from raytune_ds.console import human_bytes
from raytune_ds.engines import trained_dtype, wants_autocast
from raytune_ds.engines.choose import Choice, Sizes, state_bytes
from raytune_ds.engines.ds import config as dsconfig
from raytune_ds.errors import first_line
from raytune_ds.model.build import Built
from raytune_ds.model.footprint import foreseen, gathered
from raytune_ds.world import World

# A forward pass is busy enough with so many tokens. More gain nothing on a CPU, whose caches are small: with LoRA on a
# Qwen2 shape of 28M parameters 1,024 to 8,192 tokens at once were within 3 % of each other, and held 0.5 to 2.8 GiB,
# and with layers as wide as R1-Distill-Qwen-1.5B's 1,024 were as fast as 2,048; on a tiny model 2,048 took a fifth less
# time than 8,192. On a GPU more may still hide the time that launching work takes.
BUSY_TOKENS = {"cpu": 1024, "cuda": 8192}
# What is not foreseen takes the rest: on a GPU the CUDA context, the buffers of cuBLAS and NCCL (together about 1 GiB)
# and gaps between the allocator's blocks; on a CPU what malloc keeps for later.
USABLE = 0.9
# From the fastest to the leanest.
DEPTHS = ("none", "every-4", "every-3", "every-2", "full")


@dataclass(frozen=True)
class Cut:
    """How a worker's share of a global batch is computed.

    Attributes:
        micro_batch: packs at once.
        depth: see Built.recompute.
        needed: bytes that training takes of the worker's memory at most; None: nobody knows.
        memory: bytes the worker with the least of it has.
    """

    micro_batch: int
    depth: str
    needed: int | None
    memory: int

    def describe(self, seq_len: int) -> str:
        """A line that says what was decided."""
        nth = self.depth.removeprefix("every-")
        depth = {
            "none": "no activation checkpointing",
            "full": "activation checkpointing in every layer",
        }.get(self.depth, f"activation checkpointing in one layer of {nth}")
        line = f"micro_batch {self.micro_batch} ({self.micro_batch * seq_len:,} tokens), {depth}"
        if self.needed is None:
            return line
        return f"{line}: about {human_bytes(self.needed)} of {human_bytes(self.memory)}"

    def advice(self, seq_len: int, kind: str) -> str | None:
        """What would help where this does not fit; None where it does."""
        if self.needed is None or self.needed <= USABLE * self.memory:
            return None
        ways = [f"data.seq_len below {seq_len}"]
        if self.micro_batch > 1:
            ways.insert(0, f"train.micro_batch below {self.micro_batch}")
        if self.depth != "full":
            ways.insert(0, "train.activation_checkpointing=full")
        if kind == "ddp":
            ways.append("engine.kind=fsdp with more workers")
        return (
            f"this may not fit: training takes about {human_bytes(self.needed)}, and of the {human_bytes(self.memory)} "
            f"that a worker has about {USABLE:.0%} can be used. What helps: {'; '.join(ways)}."
        )


# --------------------------------------------------------------------------------------------- deciding


def decide(
    depths: Sequence[str],
    asked: int | None,
    share: int,
    busy: int,
    most: int,
    needs: Callable[[str, int], int],
    room: float,
) -> tuple[str, int]:
    """(depth, packs at once).

    Args:
        depths: to choose from, from the fastest to the leanest.
        asked: packs at once, where that is not open.
        share: packs of a global batch that a worker has at most.
        busy: packs that are enough to keep the hardware busy.
        most: packs to take at most.
        needs: bytes that a depth and a number of packs take; convex in packs.
        room: bytes.
    """
    wanted = min(asked or busy, share)
    depth = next((depth for depth in depths if needs(depth, wanted) <= room), depths[-1])
    if asked is not None:
        return depth, wanted
    largest = _largest(partial(needs, depth), min(busy, share), min(most, share), room)
    return depth, evenly(share, largest)


def _largest(needs: Callable[[int], int], busy: int, most: int, room: float) -> int:
    """The largest number of packs up to `most` that is known to fit, and at least 1."""
    fits, beyond = (busy, most) if needs(busy) <= room else (1, busy)
    if needs(beyond) <= room:
        return beyond
    if needs(fits) > room:
        return fits
    # Between two numbers of packs no more is needed than a straight line between what the two need.
    return fits + int((room - needs(fits)) * (beyond - fits) / (needs(beyond) - needs(fits)))


def evenly(share: int, most: int) -> int:
    """Packs at once, `most` or fewer, that cut a share into as many parts, all about the same: 16 by 9 to 8 and 8."""
    parts = -(-share // most)
    return -(-share // parts)


def busy_packs(seq_len: int, device: torch.device) -> int:
    """Packs that keep the hardware busy."""
    return max(1, BUSY_TOKENS.get(device.type, BUSY_TOKENS["cuda"]) // seq_len)


# ------------------------------------------------------------------------------------ deciding for a run


@dataclass(frozen=True)
class Situation:
    """What is decided for.

    Attributes:
        assignment: of the run.
        world: the ranks.
        choice: of the engine.
        sizes: of the model.
        memory: see World.least_memory.
        built: the model, without weights yet.
        tell: takes what people should know: a kind (note, warning) and its content.
    """

    assignment: Assignment
    world: World
    choice: Choice
    sizes: Sizes
    memory: int
    built: Built
    tell: Callable[[str, dict[str, Any]], None]

    @property
    def train(self) -> TrainConfig:
        """Of the config."""
        return self.assignment.config.train

    @property
    def seq_len(self) -> int:
        """Tokens of a pack."""
        return self.assignment.store.manifest.seq_len

    @property
    def depths(self) -> tuple[str, ...]:
        """That are open."""
        if self.train.activation_checkpointing != "auto":
            return (self.train.activation_checkpointing,)
        return DEPTHS if self.built.can_recompute else DEPTHS[:1]

    @property
    def made_for(self) -> dict[str, Any]:
        """What has to be the same for an earlier decision to hold."""
        return {
            "identity": self.assignment.identity,
            "train": [self.train.micro_batch, self.train.activation_checkpointing],
            "world": [self.world.size, self.world.device.type],
            "engine": [self.choice.kind, self.choice.settings.model_dump(mode="json")],
            # A GPU's is that of its kind; a node's is what happens to be free.
            "memory": self.memory if self.sizes.gpu else None,
        }


def fitted(situation: Situation) -> Cut:
    """How the run is computed; the model's layers recompute what they will. A collective.

    Raises:
        UserError: activations are to be recomputed, and the model's code can't.
    """
    built, tell, seq_len = situation.built, situation.tell, situation.seq_len
    built.recompute(situation.depths[-1])  # fails on all ranks, if it does
    cut: Cut = situation.world.broadcast(_kept_or_made(situation) if situation.world.is_main else None)
    built.recompute(cut.depth)
    tell("note", {"text": cut.describe(seq_len)})
    if (text := cut.advice(seq_len, situation.choice.kind)) is not None:
        tell("warning", {"text": text})
    return cut


def _kept_or_made(situation: Situation) -> Cut:
    """What the run had in this world before is kept, whatever is free now: another cut rounds its sums otherwise."""
    path, made_for = situation.assignment.run.memory, json.loads(json.dumps(situation.made_for))
    decisions: list[dict[str, Any]] = storage.read_json(path) or []
    for decision in decisions:
        if decision["made_for"] == made_for:
            return Cut(**decision["cut"])
    cut = _made(situation)
    storage.write_json(path, [*decisions, {"made_for": made_for, "cut": asdict(cut)}])
    return cut


def _made(situation: Situation) -> Cut:
    train, depths, gpu = situation.train, situation.depths, situation.sizes.gpu
    share = len(situation.assignment.plan.order.slots(0, situation.world.size))
    busy = busy_packs(situation.seq_len, situation.world.device)
    asked = None if train.micro_batch == "auto" else train.micro_batch
    held = held_bytes(situation)

    @cache
    def needs(depth: str, packs: int) -> int:
        situation.built.recompute(depth)
        autocast = wants_autocast(situation.choice.kind)
        tokens, device = packs * situation.seq_len, situation.world.device.type
        return held + foreseen(situation.built, tokens, autocast, device).peak

    try:
        room = USABLE * situation.memory
        depth, packs = decide(depths, asked, share, busy, share if gpu else busy, needs, room)
        return Cut(packs, depth, needs(depth, packs), situation.memory)
    except Exception as error:  # the model's code may do anything, and no run has to fail for an estimate
        text = f"what training takes of the memory can't be foreseen for this model: {first_line(error)}"
        situation.tell("note", {"text": text})
    packs = min(asked, share) if asked is not None else evenly(share, min(busy, share))
    return Cut(packs, depths[-1] if gpu else depths[0], None, situation.memory)


def held_bytes(situation: Situation) -> int:
    """What a worker holds besides activations."""
    choice, built = situation.choice, situation.built
    stage, offload = 0, choice.settings.offload
    if choice.kind == "zero":
        made = dsconfig.check(situation.assignment.ds_config, situation.train, choice.settings)
        stage, offload = made.stage, made.offload
    each = trained_dtype(choice.kind, built.module.dtype).itemsize
    own = state_bytes(situation.sizes, situation.world.size, choice.kind, stage, offload, each)
    return own + (gathered(built) if choice.kind == "fsdp" or stage == 3 else 0)


def looked_after(
    cut: Cut, device: torch.device, log: Callable[[dict[str, Any]], None], say: Callable[[str], None]
) -> Callable[[dict[str, Any]], None]:
    """`log` that on a CUDA device says so, once, if the first optimizer step has taken more than was foreseen."""
    if cut.needed is None or device.type != "cuda":
        return log
    needed, is_first = cut.needed, True

    def looking(row: dict[str, Any]) -> None:
        nonlocal is_first
        if is_first and "loss" in row:
            is_first = False
            taken = torch.cuda.max_memory_allocated(device)
            if taken > needed:
                say(
                    f"until the end of the first step up to {human_bytes(taken)} of the GPU's memory were taken, more "
                    f"than the {human_bytes(needed)} that were foreseen"
                )
        log(row)

    return looking
