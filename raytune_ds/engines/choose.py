"""What weights, gradients and optimizer state take of a rank's memory, and so which engine a run takes when its config
leaves that open, and why. A rule of thumb, said to the user.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ds.compatible import EIGHT_BIT, conflicts
from raytune_ds.config import EngineConfig

# A float32 gradient, AdamW's two moments in float32 or in 8 bits, and DeepSpeed's float32 parameter beside the one that
# is computed with: bytes of a trained parameter.
BYTES_GRADIENT, BYTES_MOMENTS, BYTES_MOMENTS_8BIT, BYTES_MASTER = 4, 8, 2, 4
# Parameters and moments, in the copy that a checkpoint is written from.
BYTES_COPIED = 12
# What activations, the allocator and the libraries leave of a worker's memory.
USABLE = 0.7


@dataclass(frozen=True)
class Choice:
    """An engine, its settings, and a sentence that says why."""

    kind: str
    settings: EngineConfig
    why: str


@dataclass(frozen=True)
class Sizes:
    """What there is to hold.

    Attributes:
        frozen: bytes of all parameters that are not trained.
        trainable: parameters that are.
        optim: as `train.optim`.
        gpu: workers have GPUs, and host memory beside theirs.
    """

    frozen: int
    trainable: int
    optim: str = "adamw_torch"
    gpu: bool = False


def state_bytes(
    sizes: Sizes,
    world_size: int = 1,
    kind: str = "ddp",
    stage: int = 0,
    offload: str | None = None,
    held: int = 4,
) -> int:
    """What weights, gradients and optimizer state take of one worker's memory; by default, of one that has them all.

    Args:
        sizes: of the model.
        world_size: workers that share what the engine spreads.
        kind: of the engine.
        stage: of DeepSpeed's ZeRO.
        offload: as `engine.offload`; where workers compute in host memory nothing is gained by it.
        held: bytes of a trained parameter, as it is computed with.
    """
    moments = BYTES_MOMENTS_8BIT if sizes.optim in EIGHT_BIT else BYTES_MOMENTS
    parameters = sizes.frozen + sizes.trainable * held
    gradients = sizes.trainable * BYTES_GRADIENT
    optimizer = sizes.trainable * (moments + BYTES_MASTER * (kind == "zero"))
    if sizes.gpu and offload == "parameters":
        parameters = gradients = optimizer = 0
    elif sizes.gpu and offload == "optimizer":
        optimizer = 0
    spread = 3 if kind == "fsdp" else stage

    def here(size: int, from_stage: int) -> int:
        return size // world_size if spread >= from_stage else size

    # Where workers compute in host memory, what a checkpoint is written from lies in it too, a share with each.
    copied = 0 if sizes.gpu else sizes.trainable * BYTES_COPIED // world_size
    return here(parameters, 3) + here(gradients, 2) + here(optimizer, 1) + copied


def choose(config: EngineConfig, sizes: Sizes, memory: int, world_size: int, adapter: str = "lora") -> Choice:
    """The engine that `engine.kind` names, or the simplest one that fits.

    Args:
        config: of the run.
        sizes: of the model.
        memory: bytes that the worker with the least of it has.
        world_size: number of workers.
        adapter: as `adapter.kind`.
    """
    if config.kind != "auto":
        return Choice(config.kind, config, "engine.kind says so")
    if config.asks_for_zero:
        return Choice("zero", config, "engine.stage, config or offload=optimizer asks for DeepSpeed")
    for reason in conflicts({"adapter.kind": adapter, "engine.kind": "fsdp"}):
        return Choice("ddp", config, reason)
    needed = state_bytes(sizes)
    figures = f"weights, gradients and optimizer state take {_gib(needed)}, a worker has {_gib(memory)}"
    if config.offload == "parameters":
        return Choice("fsdp", config, "it offloads parameters")
    if needed <= USABLE * memory:
        return Choice("ddp", config, figures)
    if world_size > 1 and needed / world_size <= USABLE * memory:
        return Choice("fsdp", config, f"{figures}, so {world_size} workers share them")
    may_offload = not [*conflicts({"train.optim": sizes.optim, "engine.offload": "parameters"})]
    if sizes.gpu and config.offload is None and may_offload:
        offloading = config.model_copy(update={"offload": "parameters"})
        return Choice(
            "fsdp", offloading, f"{figures}, so they are kept in host memory; more workers would be faster"
        )
    return Choice(
        "fsdp" if world_size > 1 else "ddp", config, f"{figures}, so this may not fit; take more workers"
    )


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
