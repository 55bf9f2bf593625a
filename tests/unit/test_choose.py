"""Which engine `auto` takes: the simplest that fits, what else is asked for, and the figures that say why."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ds.config import EngineConfig
from raytune_ds.engines.choose import BYTES_COPIED, BYTES_TRAINED, USABLE, Choice, choose

GIB = 1 << 30
LORA = {"total": 7_000_000_000, "trainable": 20_000_000, "frozen_bytes": 2}
WHOLE = {"total": 7_000_000_000, "trainable": 7_000_000_000, "frozen_bytes": 2}


def chosen(
    size: dict[str, int], memory: float, world_size: int = 1, gpu: bool = True, **engine: Any
) -> Choice:
    return choose(EngineConfig(**engine), **size, memory=int(memory), world_size=world_size, gpu=gpu)


def needed(size: dict[str, int], gpu: bool = True) -> int:
    frozen = size["total"] - size["trainable"]
    trained = BYTES_TRAINED if gpu else BYTES_TRAINED + BYTES_COPIED
    return frozen * size["frozen_bytes"] + size["trainable"] * trained


# ---- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp"])
@pytest.mark.parametrize("memory", [GIB, 1000 * GIB])
def test_a_kind_that_is_named_is_taken_whatever_it_needs(kind: str, memory: int) -> None:
    choice = chosen(WHOLE, memory, world_size=4, kind=kind)
    assert choice == Choice(kind, EngineConfig(kind=kind), "engine.kind says so")
    offloads = {"offload": "parameters"} if kind != "ddp" else {}
    assert chosen(WHOLE, memory, kind=kind, **offloads).settings == EngineConfig(kind=kind, **offloads)


@pytest.mark.parametrize(
    "engine",
    [
        {"stage": 1},
        {"stage": 3, "offload": "parameters"},
        {"config": "ds_config.json"},
        {"offload": "optimizer"},
    ],
)
@pytest.mark.parametrize("memory", [GIB, 1000 * GIB])
def test_what_only_deepspeed_does_asks_for_it(engine: dict[str, Any], memory: int) -> None:
    choice = chosen(LORA, memory, world_size=2, **engine)
    assert (choice.kind, choice.settings) == ("zero", EngineConfig(**engine))
    assert ("DeepSpeed" in choice.why) or ("optimizer" in choice.why)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("gpu", [False, True])
def test_offloaded_parameters_ask_for_fsdp(world_size: int, gpu: bool) -> None:
    choice = chosen(LORA, 1000 * GIB, world_size, gpu, offload="parameters")
    assert (choice.kind, choice.settings) == ("fsdp", EngineConfig(offload="parameters"))
    assert choice.why == "it offloads parameters"


# ---- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [LORA, WHOLE])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_fits_into_each_worker_is_replicated(size: dict[str, int], world_size: int, gpu: bool) -> None:
    limit = needed(size, gpu) / USABLE
    assert chosen(size, limit + 2, world_size, gpu).kind == "ddp"
    assert chosen(size, limit + 2, world_size, gpu).settings == EngineConfig()
    tight = chosen(size, limit * 0.999, world_size, gpu)
    assert tight.kind != "ddp" or (world_size == 1 and not gpu)


@pytest.mark.parametrize("size", [LORA, WHOLE])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_fits_into_all_workers_together_is_shared(size: dict[str, int], gpu: bool) -> None:
    limit = needed(size, gpu) / USABLE
    for memory in (limit / 4 + 2, limit * 0.999):
        choice = chosen(size, memory, world_size=4, gpu=gpu)
        assert (choice.kind, choice.settings) == ("fsdp", EngineConfig())
        assert choice.why.endswith(", so 4 workers share them")


@pytest.mark.parametrize("world_size", [1, 4])
def test_what_fits_nowhere_goes_to_host_memory(world_size: int) -> None:
    choice = chosen(WHOLE, needed(WHOLE) / USABLE / world_size * 0.999, world_size)
    assert (choice.kind, choice.settings) == ("fsdp", EngineConfig(offload="parameters"))
    assert "host memory" in choice.why


@pytest.mark.parametrize(("world_size", "kind"), [(1, "ddp"), (4, "fsdp")])
def test_without_gpus_there_is_no_other_memory(world_size: int, kind: str) -> None:
    choice = chosen(WHOLE, needed(WHOLE, gpu=False) / USABLE / world_size * 0.999, world_size, gpu=False)
    assert (choice.kind, choice.settings) == (kind, EngineConfig())
    assert "may not fit" in choice.why


def test_frozen_parameters_count_by_their_dtype() -> None:
    memory = 7e9 * 2 / USABLE * 1.1
    assert chosen(LORA, memory).kind == "ddp"
    assert chosen(LORA | {"frozen_bytes": 4}, memory).kind == "fsdp"
    assert chosen(WHOLE, memory).kind == "fsdp"


# ---- why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "world_size", "gpu"), [(80, 1, True), (20, 8, True), (8, 1, True), (8, 2, False)]
)
def test_the_figures_are_said(memory: int, world_size: int, gpu: bool) -> None:
    # 6.98e9 frozen at two bytes and 20e6 trained at sixteen; where there is no GPU twelve more for the copy.
    why, size = chosen(LORA, memory * GIB, world_size, gpu).why, "13.30" if gpu else "13.52"
    assert f"weights, gradients and optimizer state take {size} GiB, a worker has {memory}.00 GiB" in why
