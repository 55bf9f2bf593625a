"""Which engine `auto` takes: the simplest that fits, what else is asked for, and the figures that say why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytune_ds.config import EngineConfig
from raytune_ds.engines.choose import USABLE, Choice, Sizes, choose, state_bytes

GIB = 1 << 30
LORA = Sizes(frozen=2 * 6_980_000_000, trainable=20_000_000)
WHOLE = Sizes(frozen=0, trainable=7_000_000_000)


def chosen(size: Sizes, memory: float, world_size: int = 1, gpu: bool = True, **engine: Any) -> Choice:
    return choose(EngineConfig(**engine), replace(size, gpu=gpu), int(memory), world_size)


def needed(size: Sizes, gpu: bool = True) -> int:
    # Parameter, gradient and two moments in float32; in host memory also a checkpoint's copy of all but the gradient.
    return size.frozen + size.trainable * (16 if gpu else 28)


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
def test_what_fits_into_each_worker_is_replicated(size: Sizes, world_size: int, gpu: bool) -> None:
    limit = needed(size, gpu) / USABLE
    assert chosen(size, limit + 2, world_size, gpu).kind == "ddp"
    assert chosen(size, limit + 2, world_size, gpu).settings == EngineConfig()
    tight = chosen(size, limit * 0.999, world_size, gpu)
    assert tight.kind != "ddp" or (world_size == 1 and not gpu)


@pytest.mark.parametrize("size", [LORA, WHOLE])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_fits_into_all_workers_together_is_shared(size: Sizes, gpu: bool) -> None:
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
    assert chosen(replace(LORA, frozen=2 * LORA.frozen), memory).kind == "fsdp"
    assert chosen(WHOLE, memory).kind == "fsdp"


# ---- why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "world_size", "gpu"), [(80, 1, True), (20, 8, True), (8, 1, True), (8, 2, False)]
)
def test_the_figures_are_said(memory: int, world_size: int, gpu: bool) -> None:
    # 6.98e9 frozen at two bytes and 20e6 trained at sixteen; where there is no GPU twelve more for the copy.
    why, size = chosen(LORA, memory * GIB, world_size, gpu).why, "13.30" if gpu else "13.52"
    assert f"weights, gradients and optimizer state take {size} GiB, a worker has {memory}.00 GiB" in why


# ---- what a worker holds ----------------------------------------------------------------------------

SHARED = Sizes(frozen=1000, trainable=100, gpu=True)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"kind": "ddp"}, 1000 + 100 * (4 + 4 + 8)),
        ({"kind": "fsdp"}, (1000 + 100 * (4 + 4 + 8)) // 4),
        # DeepSpeed computes with two bytes, and has a float32 parameter beside each.
        ({"kind": "zero", "stage": 1, "held": 2}, 1000 + 100 * (2 + 4) + 100 * (4 + 8) // 4),
        ({"kind": "zero", "stage": 2, "held": 2}, 1000 + 100 * 2 + 100 * (4 + 4 + 8) // 4),
        ({"kind": "zero", "stage": 3, "held": 2}, (1000 + 100 * (2 + 4 + 4 + 8)) // 4),
        ({"kind": "zero", "stage": 2, "held": 2, "offload": "optimizer"}, 1000 + 100 * 2 + 100 * 4 // 4),
        ({"kind": "zero", "stage": 3, "held": 2, "offload": "parameters"}, 0),
        ({"kind": "fsdp", "offload": "parameters"}, 0),
    ],
)
def test_what_an_engine_spreads_and_offloads(engine: dict[str, Any], expected: int) -> None:
    assert state_bytes(SHARED, 4, **engine) == expected


def test_nothing_is_offloaded_from_host_memory_to_host_memory() -> None:
    here = replace(SHARED, gpu=False)
    for offload in (None, "none", "parameters"):
        assert state_bytes(here, 4, "fsdp", offload=offload) == (1000 + 100 * 16) // 4 + 100 * 12 // 4


def test_moments_in_8_bits_take_a_quarter() -> None:
    assert state_bytes(SHARED) - state_bytes(replace(SHARED, optim="adamw_8bit")) == 100 * (8 - 2)
