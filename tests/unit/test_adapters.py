"""Which layers get an adapter, what the report says of it, and that plain peft reads it back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import adapters, tiny
from raytune_ds.model.load import skeleton

MLA = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
AUTO = {
    "deepseek-v2": sorted(["q_proj", *MLA]),
    "deepseek-v3": sorted(["q_a_proj", "q_b_proj", *MLA]),
    "qwen2": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
}
ARCHITECTURES = list(AUTO)
MOE = [name for name in ARCHITECTURES if name.startswith("deepseek")]


@pytest.fixture(scope="module")
def skeletons(tiny_models: dict[str, Path]) -> dict[str, Any]:
    """Each architecture without weights."""
    return {name: skeleton(ModelConfig(name=str(path))) for name, path in tiny_models.items()}


def config(**values: Any) -> AdapterConfig:
    return AdapterConfig(r=4, alpha=8.0, **values)


def short(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def refusal(model: Any, targets: Any) -> str:
    with pytest.raises(UserError) as caught:
        adapters.resolve_targets(model, config(targets=targets))
    return str(caught.value)


# ---- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_takes_every_projection_that_peft_leaves_in_place(
    skeletons: dict[str, Any], architecture: str
) -> None:
    model = skeletons[architecture]
    resolved = adapters.resolve_targets(model, config())
    assert short(resolved) == AUTO[architecture]
    # In every layer, each once.
    assert len(resolved) == len(set(resolved)) == len(AUTO[architecture]) * model.config.num_hidden_layers
    assert not any("lm_head" in name for name in resolved)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_names_ends_of_names_and_patterns(skeletons: dict[str, Any], architecture: str) -> None:
    model = skeletons[architecture]

    def resolve(targets: Any) -> list[str]:
        return adapters.resolve_targets(model, config(targets=targets))

    assert short(resolve(["q_proj", "v_proj"])) == ["q_proj", "v_proj"]
    assert resolve(["layers.2.mlp.up_proj"]) == ["model.layers.2.mlp.up_proj"]
    assert resolve(r".*layers\.[01]\.self_attn\.o_proj") == [
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    ]
    assert short(resolve("all-linear")) == AUTO[architecture]


def test_a_pattern_has_to_match_the_whole_name(skeletons: dict[str, Any]) -> None:
    assert "matches no linear layer" in refusal(skeletons["llama"], "q_proj")
    assert "matches no linear layer" in refusal(skeletons["llama"], ["proj"])


def test_names_of_other_models_are_refused_with_those_that_would_match(skeletons: dict[str, Any]) -> None:
    message = refusal(skeletons["deepseek-v3"], ["q_proj", "v_proj"])
    assert "'q_proj' matches no linear layer of this deepseek_v3 model; did you mean" in message
    assert "'v_proj' matches no linear layer" in message
    for name in AUTO["deepseek-v3"]:
        assert name in message
    # One of two is enough to be refused: half an adapter would be a surprise.
    assert "'v_proj'" in refusal(skeletons["deepseek-v2"], ["q_proj", "v_proj"])


@pytest.mark.parametrize("architecture", MOE)
@pytest.mark.parametrize("targets", [["down_proj"], ["o_proj", "up_proj"], r".*\.gate_proj", "all-linear"])
def test_names_that_peft_moves_to_the_routed_experts_are_refused(
    skeletons: dict[str, Any], architecture: str, targets: Any
) -> None:
    message = refusal(skeletons[architecture], targets)
    assert "fused routed experts" in message
    assert f"Use adapter.targets=auto ({', '.join(AUTO[architecture])})." in message
    refused = message.partition(": in this")[0]
    assert "o_proj" not in re.split(r"[:, ]+", refused)


# ---- the report -----------------------------------------------------------------------------------


def with_biases(architecture: str) -> Any:
    """A model whose attention has biases, as Qwen2's always has."""
    shape = tiny.ARCHITECTURES[architecture] | {"vocab_size": 500}
    extra = {} if architecture == "qwen2" else {"attention_bias": True}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **extra))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_report_counts_what_peft_trains(architecture: str, bias: str) -> None:
    model = with_biases(architecture)
    assert any(name.endswith("bias") for name, _ in model.named_parameters())
    settings = config(bias=bias)
    report = adapters.report(model, settings)
    parameters = list(adapters.apply(model, settings, torch.float32).parameters())
    assert report.trainable == sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_report_counts_every_parameter_once(bias: str) -> None:
    model = with_biases("qwen2")
    report = adapters.report(model, config(bias=bias))
    ready = adapters.apply(model, config(bias=bias), torch.float32)
    assert report.total == sum(p.numel() for p in ready.parameters())


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32])
def test_what_is_trained_has_a_dtype_of_its_own(bias: str, frozen: torch.dtype, trained: torch.dtype) -> None:
    model = adapters.apply(with_biases("qwen2").to(frozen), config(bias=bias), trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {frozen}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_an_adapter_everything_is_trained(tiny_models: dict[str, Path], architecture: str) -> None:
    model = skeleton(ModelConfig(name=str(tiny_models[architecture]))).requires_grad_(False)
    report = adapters.report(model, config(kind="none"))
    ready = adapters.apply(model, config(kind="none"), torch.float32)
    total = sum(p.numel() for p in ready.parameters() if p.requires_grad)
    assert (report.trainable, report.total) == (total, total)


def test_the_report_says_what_was_left_alone_and_why(skeletons: dict[str, Any]) -> None:
    report = adapters.report(skeletons["deepseek-v3"], config())
    why = {group.name: group.note for group in report.left_alone}
    assert "routed experts" in why["experts.gate_up_proj"]
    assert "routed experts" in why["experts.down_proj"]
    assert "router" in why["mlp.gate"]
    assert "routed experts" in why["shared_experts.up_proj"]
    assert all(any(word in note for note in why.values()) for word in ("output head", "embedding"))
    assert [group.name for group in report.adapted].count("q_a_proj") == 1
    text = "\n".join(report.lines())
    for word in ("q_a_proj x4", "experts.gate_up_proj", "routed experts"):
        assert word in text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_report_forgets_no_matrix(skeletons: dict[str, Any], architecture: str) -> None:
    model = skeletons[architecture]
    report = adapters.report(model, config())
    told = sum(group.num_parameters for group in (*report.adapted, *report.left_alone))
    assert told == sum(p.numel() for p in model.parameters() if p.ndim >= 2)


# ---- what peft makes of it ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_adapts_what_was_resolved_and_plain_peft_loads_it(
    tiny_models: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    from peft import PeftModel

    source = str(tiny_models[architecture])
    base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32)
    settings = config(bias="none")
    resolved = adapters.resolve_targets(base, settings)
    torch.manual_seed(0)
    model: Any = adapters.apply(base, settings, torch.float32)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(resolved)
    # lora_B begins at zero, so that an adapter that was lost would not show.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
    assert (expected - bare).abs().max() > 1e-2
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, str(tmp_path)).eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
