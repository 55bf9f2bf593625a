"""What goes with what: refused before anything starts, with what to do instead; the table that people see."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ds import engines
from raytune_ds.assignment import Base
from raytune_ds.check import check
from raytune_ds.compatible import ENGINES, OTHERS, RULES, conflicts, matrix
from raytune_ds.compose import compose
from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.engines.choose import USABLE, Sizes, choose
from raytune_ds.errors import UserError


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose([], list(overrides))
    return str(caught.value)


def test_every_reason_comes_at_once() -> None:
    message = refusal(
        "model.quantization=nf4", "adapter.kind=none", "train.optim=adamw_8bit", "engine.kind=zero"
    )
    assert "adapter.kind" in message
    assert "a quantized weight can't be trained itself; take an adapter" in message
    assert "engine.kind" in message
    assert "does not go with train.optim=adamw_8bit: DeepSpeed keeps the moments itself" in message


@pytest.mark.parametrize("begins", ["pissa", "pissa_niter_4", "olora"])
def test_nothing_is_taken_out_of_a_base_that_is_then_quantised(begins: str) -> None:
    message = refusal("model.quantization=nf4", f"adapter.init_lora_weights={begins}")
    assert "adapter.init_lora_weights" in message
    assert "take loftq or default" in message
    compose([], ["model.quantization=nf4", "adapter.init_lora_weights=loftq"])


@pytest.mark.parametrize("asked", ["engine.stage=2", "engine.offload=optimizer", "engine.kind=zero"])
def test_whatever_asks_for_deepspeed_is_refused_an_optimizer_of_its_own(asked: str) -> None:
    assert "DeepSpeed keeps the moments itself" in refusal("train.optim=paged_adamw_8bit", asked)


def test_nothing_is_paged_twice() -> None:
    message = refusal("train.optim=paged_adamw_8bit", "engine.kind=fsdp", "engine.offload=parameters")
    assert "engine.offload" in message
    assert "updated in host memory already" in message


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "int4", "fp8"])
def test_a_quantised_base_goes_with_every_engine(engine: str, quantization: str) -> None:
    config = compose([], [f"model.quantization={quantization}", f"engine.kind={engine}"])
    assert config.model.quantization == quantization


def test_memory_is_not_paged_on_a_cpu() -> None:
    train = TrainConfig(optim="paged_adamw_8bit")
    with pytest.raises(UserError, match=r"CUDA GPU and its host only; take train\.optim=adamw_8bit"):
        engines.prepare("ddp", EngineConfig(), train, None, torch.device("cpu"), say=lambda _: None)
    config = compose([], ["train.optim=paged_adamw_8bit", "scaling.use_gpu=false", "tracking.to=[]"])
    with pytest.raises(UserError, match=r"scaling\.use_gpu is false"):
        check(config)


def test_what_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ds.model.lowbits import low_bits

    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    low_bits.cache_clear()
    for asked in ("model.quantization=nf4", "train.optim=adamw_8bit"):
        overrides = [f"run.storage={tmp_path}", "tracking.to=[]", f"model.name={tiny_models['qwen2']}", asked]
        with pytest.raises(UserError, match=r"pip install 'raytune_ds\[quantization\]'") as caught:
            check(compose([], overrides))
        assert asked.replace("=", " = ") in str(caught.value)


def test_the_table_has_a_cell_for_each_pair_and_its_notes() -> None:
    columns, rows, notes = matrix()
    assert len(columns) == len(ENGINES) + 1
    assert [row[0] for row in rows] == list(OTHERS)
    assert {len(row) for row in rows} == {len(columns)}
    assert len(notes) == len({rule.why for rule in RULES})
    cells = {(row[0], column): cell for row in rows for column, cell in zip(columns, row, strict=True)}
    assert cells["nf4 + adapter", "zero stage=3"] == "yes"
    assert cells["quantized, no adapter", "ddp"] == "no (1)"
    assert cells["adamw_8bit", "fsdp"] == "yes"
    assert cells["adamw_8bit", "zero stage=1"].startswith("no")
    # No note that no cell has.
    shown = " ".join(cell for row in rows for cell in row)
    assert all(f"({number})" in shown for number in range(1, len(notes) + 1))


def test_an_open_key_breaks_nothing() -> None:
    assert not [*conflicts({"model.quantization": "nf4"})]
    assert not [*conflicts({"train.optim": "adamw_8bit", "engine.kind": "auto"})]


# ---- which engine is taken -------------------------------------------------------------------------

GIB = 1 << 30
# A 7B model in NF4, with 1.1 billion parameters in embedding and head.
SIZE: dict[str, Any] = {"total": 7_020_000_000, "trainable": 20_000_000}
IN_BITS = {"quantized": 5_900_000_000, "quantized_bytes": 3_050_000_000}


def test_quantised_parameters_count_by_their_bytes() -> None:
    needed = 1_100_000_000 * 2 + 3_050_000_000 + 20_000_000 * 16
    for factor, kind in ((1.01, "ddp"), (0.99, "fsdp")):
        memory = int(needed / USABLE * factor)
        frozen = Base("", None, **SIZE, **IN_BITS).frozen_bytes(2)
        choice = choose(EngineConfig(), Sizes(frozen, 20_000_000, gpu=True), memory, world_size=4)
        assert choice.kind == kind
        assert f"take {needed / GIB:.2f} GiB" in choice.why
    plain = Sizes(Base("", None, **SIZE).frozen_bytes(2), 20_000_000, gpu=True)
    assert choose(EngineConfig(), plain, memory, world_size=4).kind == "fsdp"


def test_moments_in_8_bits_count_by_theirs() -> None:
    memory = int(10**9 * 10 / USABLE * 1.01)
    for optim, kind in (("adamw_8bit", "ddp"), ("adamw_torch", "fsdp")):
        choice = choose(EngineConfig(), Sizes(0, 10**9, optim, gpu=True), memory, world_size=4)
        assert choice.kind == kind


def test_what_is_chosen_goes_with_the_optimizer() -> None:
    for optim, offload in (("adamw_8bit", "parameters"), ("paged_adamw_8bit", None)):
        choice = choose(EngineConfig(), Sizes(0, 10**9, optim, gpu=True), GIB, world_size=1)
        assert choice.settings.offload == offload
        chosen = {"train.optim": optim, "engine.kind": choice.kind, "engine.offload": str(offload)}
        assert not [*conflicts(chosen)]


def test_adalora_takes_one_engine() -> None:
    with pytest.raises(UserError, match="no worker has these"):
        compose([], ["adapter.kind=adalora", "engine.kind=fsdp"])
    choice = choose(EngineConfig(), Sizes(4 * 10**12, 10, gpu=True), 10**9, world_size=4, adapter="adalora")
    assert choice.kind == "ddp"
    assert "take engine.kind=ddp" in choice.why


def test_loftq_needs_something_that_was_lost() -> None:
    with pytest.raises(UserError, match=r"adapter\.init_lora_weights.*model\.quantization=nf4"):
        compose([], ["adapter.init_lora_weights=loftq"])
    assert compose([], ["adapter.init_lora_weights=loftq", "model.quantization=nf4"])
