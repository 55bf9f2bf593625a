"""Which engine a run takes when its config leaves that open, and why. A rule of thumb, said to the user."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ds.compatible import EIGHT_BIT, conflicts
from raytune_ds.config import EngineConfig

# Float32 parameters and gradients, and AdamW's two moments.
BYTES_TRAINED = 16
# The same with moments in 8 bits.
BYTES_TRAINED_8BIT = 10
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


def choose(
    config: EngineConfig,
    total: int,
    trainable: int,
    frozen_bytes: int,
    memory: int,
    world_size: int,
    gpu: bool,
    quantized: int = 0,
    quantized_bytes: int = 0,
    optim: str = "adamw_torch",
    adapter: str = "lora",
) -> Choice:
    """The engine that `engine.kind` names, or the simplest one that fits.

    Args:
        config: of the run.
        total: parameters of the model.
        trainable: those of them that are trained.
        frozen_bytes: bytes of a frozen parameter that is not quantized.
        memory: bytes that the worker with the least of it has.
        world_size: number of workers.
        gpu: workers have GPUs, and host memory beside theirs.
        quantized: parameters that are held in few bits.
        quantized_bytes: what these take.
        optim: as `train.optim`.
        adapter: as `adapter.kind`.
    """
    if config.kind != "auto":
        return Choice(config.kind, config, "engine.kind says so")
    if config.asks_for_zero:
        return Choice("zero", config, "engine.stage, config or offload=optimizer asks for DeepSpeed")
    for reason in conflicts({"adapter.kind": adapter, "engine.kind": "fsdp"}):
        return Choice("ddp", config, reason)
    # Where workers compute in host memory, the copy that a checkpoint is written from lies in it too.
    trained_bytes = (BYTES_TRAINED_8BIT if optim in EIGHT_BIT else BYTES_TRAINED) + BYTES_COPIED * (not gpu)
    frozen = (total - trainable - quantized) * frozen_bytes + quantized_bytes
    needed = frozen + trainable * trained_bytes
    sizes = f"weights, gradients and optimizer state take {_gib(needed)}, a worker has {_gib(memory)}"
    if config.offload == "parameters":
        return Choice("fsdp", config, "it offloads parameters")
    if needed <= USABLE * memory:
        return Choice("ddp", config, sizes)
    if world_size > 1 and needed / world_size <= USABLE * memory:
        return Choice("fsdp", config, f"{sizes}, so {world_size} workers share them")
    may_offload = not [*conflicts({"train.optim": optim, "engine.offload": "parameters"})]
    if gpu and config.offload is None and may_offload:
        offloading = config.model_copy(update={"offload": "parameters"})
        return Choice(
            "fsdp", offloading, f"{sizes}, so they are kept in host memory; more workers would be faster"
        )
    return Choice(
        "fsdp" if world_size > 1 else "ddp", config, f"{sizes}, so this may not fit; take more workers"
    )


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
