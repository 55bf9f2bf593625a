"""Adapters as peft makes them, what the report says of them, and that plain peft reads them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.adapterreport import AdapterReport
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import adapters, tiny
from raytune_ds.model.adapterreport import report
from raytune_ds.model.initial import Initial
from raytune_ds.model.load import skeleton

ARCHITECTURES = list(tiny.ARCHITECTURES)
# Sizes that divide those of the tiny models.
OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 64},
    "vblora": {"vector_length": 64},
    "adalora": {"total_step": 100},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def bare(tiny_models: Mapping[str, Path], architecture: str) -> Any:
    return skeleton(ModelConfig(name=str(tiny_models[architecture])))


def config(**values: Any) -> AdapterConfig:
    return AdapterConfig(**{"r": 4, "alpha": 8.0} | values)


# ---- the report -----------------------------------------------------------------------------------


def with_biases(architecture: str) -> Any:
    """A model whose attention has biases, as Qwen2's always has."""
    shape = tiny.ARCHITECTURES[architecture] | {"vocab_size": 500}
    extra = {} if architecture == "qwen2" else {"attention_bias": True}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **extra))


def counted(model: Any, settings: AdapterConfig) -> tuple[int, int]:
    parameters = list(adapters.apply(model, settings, torch.float32).parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"targets": "all"},
        {"modules_to_save": ["embed_tokens"]},
        {"kind": "none"},
    ],
    ids=str,
)
def test_the_report_counts_what_is_trained_and_all_there_is(
    architecture: str, values: dict[str, Any]
) -> None:
    found = report(with_biases(architecture), config(**values))
    assert (found.trainable, found.total) == counted(with_biases(architecture), config(**values))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_report_forgets_no_matrix(tiny_models: dict[str, Path], architecture: str) -> None:
    found = report(bare(tiny_models, architecture), config())
    told = sum(group.num_parameters for group in (*found.adapted, *found.left_alone))
    assert told == sum(p.numel() for p in bare(tiny_models, architecture).parameters() if p.ndim >= 2)


def test_the_report_shows_parts_ranks_and_experts(tiny_models: dict[str, Path]) -> None:
    settings = config(targets="all", rank_pattern={"kv_b_proj": 16})
    found = report(bare(tiny_models, "deepseek-v3"), settings)
    groups = {(group.part, group.name): group for group in found.adapted}
    assert groups["attention", "kv_b_proj"].ranks == (16,) * 4
    assert groups["attention", "o_proj"].ranks == (4,) * 4
    experts = groups["experts", "gate_up_proj"]
    assert (experts.count, experts.layers, experts.ranks) == (3, 3, (4,) * 3)
    # Every expert has matrices of its own: 8 experts, 128 in, 2 x 96 out.
    assert experts.trained == 3 * 8 * 4 * (128 + 192)
    assert sum(group.trained for group in found.adapted) == found.trainable
    text = "\n".join(found.lines())
    for words in (
        "8 of 8 experts",
        "r 16",
        "as a bare parameter",
        "router gate x3 (adapter.targets=[router] would)",
    ):
        assert words in text


def test_the_report_says_whose_whole_gradient_is_made(tiny_models: dict[str, Path]) -> None:
    for targets, widest in (("all", 0), (["experts", "router"], 8 * 128)):  # 8 experts, 128 in
        found = report(bare(tiny_models, "deepseek-v3"), config(targets=targets))
        assert found.widest_bare == widest
        assert ("gradient of all of it" in "\n".join(found.lines())) == (widest > 0)


def test_the_report_says_what_vllm_can_serve(tiny_models: dict[str, Path]) -> None:
    plain = report(bare(tiny_models, "deepseek-v3"), config())
    assert plain.unserved == ()
    found = report(bare(tiny_models, "deepseek-v3"), config(targets="all", rank_pattern={"o_proj": 8}))
    assert len(found.unserved) == 2
    assert "adapted experts" in "\n".join(found.lines())


def test_the_report_says_what_auto_leaves_out_and_why(tiny_models: dict[str, Path]) -> None:
    text = "\n".join(report(bare(tiny_models, "deepseek-v3"), config()).lines())
    assert "experts gate_up_proj x3, down_proj x3" in text
    assert "bare parameters only" in text
    assert "embedding embed_tokens x1; head lm_head x1 (adapter.modules_to_save" in text


def test_without_an_adapter_all_is_trained(tiny_models: dict[str, Path]) -> None:
    model = bare(tiny_models, "llama").requires_grad_(False)
    ready = adapters.apply(model, config(kind="none"), torch.float32)
    assert all(p.requires_grad for p in ready.parameters())
    assert report(bare(tiny_models, "llama"), config(kind="none")) == AdapterReport(
        *[sum(p.numel() for p in model.parameters())] * 2
    )


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32])
def test_what_is_trained_has_a_dtype_of_its_own(bias: str, frozen: torch.dtype, trained: torch.dtype) -> None:
    model = adapters.apply(with_biases("qwen2").to(frozen), config(bias=bias), trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {frozen}


# ---- what peft makes of it ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("targets", ["auto", "attention", "shared-experts", "experts", "all"])
def test_plain_peft_loads_what_was_adapted(
    tiny_models: dict[str, Path], tmp_path: Path, architecture: str, targets: str
) -> None:
    source = str(tiny_models[architecture])
    settings = config(targets=targets)
    try:
        model: Any = adapters.apply(AutoModelForCausalLM.from_pretrained(source), settings, torch.float32)
    except UserError:
        assert targets in ("shared-experts", "experts")
        assert not architecture.startswith("deepseek")
        return
    torch.manual_seed(0)
    # lora_B begins at zero, so that an adapter that was lost would not show.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert (expected - plain).abs().max() > 1e-3
    Initial.of(model).write(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(source)
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        merged = loaded.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


def test_the_saved_config_holds_peft_s_keys_alone(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    import json

    model: Any = adapters.apply(bare(tiny_models, "deepseek-v3"), config(targets="all"), torch.float32)
    Initial.of(model).write(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved) <= {field.name for field in fields(LoraConfig)} | {
        "peft_type",
        "auto_mapping",
        "peft_version",
    }
    assert set(saved["target_parameters"]) == {
        *("experts.gate_up_proj", "experts.down_proj"),
        *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),  # dense and shared
    }


def test_layers_are_told_to_peft(tiny_models: dict[str, Path]) -> None:
    settings = config(targets="all", layers=[1, [2, 3]])
    model: Any = adapters.apply(bare(tiny_models, "deepseek-v3"), settings, torch.float32)
    adapted = {name.split(".")[4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"1", "2", "3"}


# ---- other methods --------------------------------------------------------------------------------


def draw(model: Any, made: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ready = get_peft_model(model, made)
    kept = {name: p.detach().clone() for name, p in ready.named_parameters() if p.requires_grad}
    return kept | {name: buffer.clone() for name, buffer in ready.named_buffers()}


@pytest.mark.parametrize("kind", adapters.kinds())
def test_methods_begin_without_weights_as_they_begin_with_them(
    tiny_models: dict[str, Path], kind: str
) -> None:
    """A method that looks at the base weights would begin wrongly, and has to be among those that are refused."""
    settings = AdapterConfig(kind=kind, options=OPTIONS.get(kind, {}))
    torch.manual_seed(0)
    ready: Any = adapters.apply(bare(tiny_models, "qwen2"), settings, torch.float32)
    ours = {name: p.detach() for name, p in ready.named_parameters() if p.requires_grad} | dict(
        ready.named_buffers()
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    before = {id(p): p.detach().clone() for p in base.parameters()}
    held = {id(p): p for p in base.parameters()}
    expected = draw(base, ready.peft_config["default"])
    assert all(torch.equal(before[key], held[key]) for key in before)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_every_method_of_peft_is_known_or_refused_with_a_reason(tiny_models: dict[str, Path]) -> None:
    for kind in (str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING):
        if kind in adapters.kinds():
            continue
        with pytest.raises(UserError, match=f"adapter.kind = {kind}: "):
            adapters.apply(
                bare(tiny_models, "qwen2"), AdapterConfig(kind=kind, targets=["q_proj"]), torch.float32
            )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "lro"}, "Did you mean .*lora"),
        ({"kind": "ia3", "r": 4}, "adapter.r = 4: has no meaning with adapter.kind=ia3"),
        ({"kind": "vera", "options": {"projection_key": 1}}, "did you mean projection_prng_key"),
        ({"modules_to_save": ["embed_token"]}, "did you mean embed_tokens"),
        ({"kind": "c3a"}, "peft refuses it"),
        ({"rank_pattern": {"o_pro": 4}}, "did you mean o_proj"),
        ({"alpha_pattern": {"layers.9.self_attn.o_proj": 4}}, "matches nothing that gets an adapter"),
    ],
)
def test_mistakes_are_told(tiny_models: dict[str, Path], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapters.apply(bare(tiny_models, "qwen2"), AdapterConfig(**values), torch.float32)
