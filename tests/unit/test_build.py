"""The module that is trained: no weights of its own, and initial values that equal plain transformers' and peft's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.engines.fill import fill
from raytune_ds.errors import UserError
from raytune_ds.model.adapterreport import report
from raytune_ds.model.build import Built, build
from raytune_ds.model.footprint import LiveBytes
from raytune_ds.model.load import packed_attention, skeleton
from raytune_ds.model.targets import choose
from raytune_ds.world import World
from tests.unit.test_packed import documents, pack, wrap
from tests.unit.test_weights import ARCHITECTURES, distinct, tie, to_fp8

FLOAT, HALF = torch.float32, torch.bfloat16
SEED = 7


pytestmark = pytest.mark.usefixtures("one_thread")


def built(folder: Path, dtype: torch.dtype = HALF, trained: torch.dtype = FLOAT, **adapter: Any) -> Built:
    config = AdapterConfig(**{"r": 4, "alpha": 8.0, **adapter})
    return build(ModelConfig(name=str(folder)), config, SEED, dtype, trained)


def parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return dict(module.named_parameters())


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT)


def plain_peft(folder: Path, **settings: Any) -> Any:
    """What a user's own script would make of a seed."""
    model = plain(folder)
    targets = sorted({matrix.short for matrix in choose(model, AdapterConfig()).all})
    lora = LoraConfig(r=4, lora_alpha=8.0, target_modules=targets, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(SEED)
    return get_peft_model(model, lora)


# ---- shapes and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("trained", [HALF, FLOAT])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_parameters_have_a_dtype_and_no_memory(
    folders: dict[str, Path], architecture: str, dtype: torch.dtype, trained: torch.dtype, kind: str
) -> None:
    made = built(folders[architecture], dtype, trained, kind=kind)
    for name, parameter in made.module.named_parameters():
        assert parameter.dtype == (trained if parameter.requires_grad else dtype), name
        assert parameter.requires_grad == (kind == "none" or "lora_" in name)
        assert parameter.is_meta or "lora_" in name, name
    for name, buffer in made.module.named_buffers():
        assert (buffer.dtype, buffer.device.type) == (FLOAT, "cpu"), name
    assert made.module.dtype == dtype


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_trained_shapes(folders: dict[str, Path], architecture: str, kind: str) -> None:
    folder = folders[architecture]
    made = built(folder, kind=kind)
    reference = plain_peft(folder) if kind == "lora" else plain(folder)
    expected = {f"model.{n}": p.shape for n, p in reference.named_parameters() if p.requires_grad}
    assert made.trained == expected
    assert made.trainable == sum(shape.numel() for shape in expected.values())
    config = AdapterConfig(kind=kind, r=4, alpha=8.0)
    assert made.trainable == report(plain(folder), config).trainable


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_blocks_are_the_layers_of_the_transformer(
    folders: dict[str, Path], architecture: str, kind: str
) -> None:
    made = built(folders[architecture], kind=kind)
    assert made.blocks == tuple(made.base.model.layers)
    assert len(made.blocks) == 4
    assert set(made.blocks) <= set(made.module.modules())


# ---- activations that are recomputed ---------------------------------------------------------------

DEPTHS = {"none": "----", "full": "xxxx", "every-2": "x-x-", "every-3": "x--x", "every-9": "x---"}


@pytest.mark.parametrize("depth", DEPTHS)
def test_so_many_layers_recompute(folders: dict[str, Path], depth: str) -> None:
    made = built(folders["llama"])
    for before in DEPTHS:  # whatever it was
        made.recompute(before)
        made.recompute(depth)
        assert "".join("-x"[block.gradient_checkpointing] for block in made.blocks) == DEPTHS[depth]


@pytest.mark.parametrize("architecture", ["qwen2", "deepseek-v3"])
@pytest.mark.parametrize("adapter", [{"kind": "lora", "dropout": 0.3}, {"kind": "none"}])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_recomputing_changes_no_bit_and_keeps_less(
    folders: dict[str, Path], architecture: str, adapter: dict[str, Any], dtype: torch.dtype
) -> None:
    made = built(folders[architecture], dtype, **adapter)
    fill(made.module, made.read, World.alone())
    trained = [p for p in made.module.parameters() if p.requires_grad]
    with torch.no_grad():
        for number, parameter in enumerate(trained):  # B begins with zeros, and A would have no gradient
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))

    def run(depth: str) -> tuple[list[torch.Tensor], int]:
        made.recompute(depth)
        torch.manual_seed(3)  # dropout
        live = LiveBytes()
        with live:
            losses_N = made.module.train()(pack(documents()))
            kept = live.now
        return [
            losses_N.detach(),
            *torch.autograd.grad(losses_N.sum(), trained, materialize_grads=True),
        ], kept

    (expected, most), kept = run("none"), []
    assert all(gradient.any() for gradient in expected)
    for depth in ("every-4", "every-2", "full"):
        found, bytes_kept = run(depth)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        kept.append(bytes_kept / most)
    # Three of four layers, half of them and none keep what they make.
    assert kept[0] > kept[1] > kept[2]
    assert kept == pytest.approx([0.75 + kept[2] / 4, 0.5 + kept[2] / 2, kept[2]], abs=0.05)
    assert kept[2] < 0.3


def test_what_cannot_recompute_says_so(folders: dict[str, Path]) -> None:
    made = built(folders["llama"])
    made.base.supports_gradient_checkpointing = False
    made.recompute("none")
    with pytest.raises(UserError, match=r"train\.activation_checkpointing = every-2.*set none"):
        made.recompute("every-2")


# ---- values ---------------------------------------------------------------------------------------


def assert_begins_as(made: Built, expected: Any) -> None:
    """Names, initial values, and which of them are trained, are those of a model of transformers or peft."""
    reference = {f"model.{name}": parameter for name, parameter in expected.named_parameters()}
    ours, rng = parameters(made.module), random.Random(0)
    assert ours.keys() == reference.keys()
    for name, parameter in reference.items():
        flat = parameter.detach().reshape(-1)
        start, stop = sorted(rng.sample(range(flat.numel() + 1), 2))
        for first, last in ((0, flat.numel()), (start, stop)):
            values = made.read(name, first, last)
            assert torch.equal(values.to(ours[name].dtype), flat[first:last].to(ours[name].dtype)), name
        assert ours[name].requires_grad == parameter.requires_grad, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("trained", [FLOAT, HALF])
def test_an_adapter_begins_as_plain_peft_begins_it(
    folders: dict[str, Path], architecture: str, trained: torch.dtype
) -> None:
    reference = plain_peft(folders[architecture])
    assert_begins_as(built(folders[architecture], trained=trained), reference)
    drawn = [p for name, p in reference.named_parameters() if "lora_A" in name]
    assert all(p.any() for p in drawn)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_begin_as_those_of_the_base_model(folders: dict[str, Path], bias: str) -> None:
    folder = folders["qwen2"]
    made = built(folder, bias=bias, dropout=0.1)
    assert_begins_as(made, plain_peft(folder, bias=bias, lora_dropout=0.1))
    assert sum("bias" in name for name in made.trained) == 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_an_adapter_it_begins_as_the_base_model(folders: dict[str, Path], architecture: str) -> None:
    assert_begins_as(built(folders[architecture], kind="none"), plain(folders[architecture]))


def test_the_seed_decides_the_adapter_alone(folders: dict[str, Path]) -> None:
    config = ModelConfig(name=str(folders["deepseek-v3"]))
    made = []
    for state, seed in ((1, SEED), (2, SEED), (1, SEED + 1)):
        torch.manual_seed(state)  # whatever was drawn before
        made.append(build(config, AdapterConfig(), seed, FLOAT, FLOAT))
    for name, parameter in made[0].module.named_parameters():
        first, again, other = (b.read(name, 0, parameter.numel()) for b in made)
        assert torch.equal(first, again)
        assert torch.equal(first, other) == ("lora_A" not in name)


def test_training_on_the_module_does_not_change_what_it_began_with(folders: dict[str, Path]) -> None:
    made = built(folders["llama"])
    name = next(name for name in made.trained if "lora_A" in name)
    before = made.read(name, 0, 8).clone()
    with torch.no_grad():
        parameters(made.module)[name].add_(1.0)
    assert torch.equal(made.read(name, 0, 8), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_buffers_are_those_of_the_base_model(folders: dict[str, Path], architecture: str) -> None:
    made = built(folders[architecture], kind="none")
    expected = dict(plain(folders[architecture]).named_buffers())
    found = dict(made.base.named_buffers())
    assert found.keys() == expected.keys()
    assert {id(b) for b in made.module.buffers()} == {id(b) for b in found.values()}
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name]), name
        assert buffer.dtype == expected[name].dtype == FLOAT
    assert any("inv_freq" in name for name in expected)
    corrections = [b for name, b in found.items() if "e_score_correction_bias" in name]
    assert len(corrections) == (3 if architecture == "deepseek-v3" else 0)
    assert all(b.any() for b in corrections)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_filled_it_computes_what_the_plain_model_computes(
    folders: dict[str, Path], architecture: str
) -> None:
    made = built(folders[architecture], dtype=FLOAT)
    fill(made.module, made.read, World.alone())
    rows = documents()
    with torch.no_grad():
        found = made.module.eval()(pack(rows))
        expected = wrap_plain(folders[architecture])(pack(rows))
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


def wrap_plain(folder: Path) -> Any:
    """PackedLM around a model with weights that transformers loaded."""
    implementation = packed_attention(ModelConfig(name=str(folder)))
    return wrap(
        AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT, attn_implementation=implementation).eval()
    )


# ---- other forms of base models -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_tied_embeddings_stay_tied(tiny_models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = distinct(tiny_models["llama"], tmp_path / "tied")
    tie(folder)
    made = built(folder, dtype=FLOAT, kind=kind)
    assert_begins_as(made, plain_peft(folder) if kind == "lora" else plain(folder))
    fill(made.module, made.read, World.alone())
    assert made.base.get_output_embeddings().weight is made.base.get_input_embeddings().weight
    assert not any("lm_head" in name for name in made.trained)
    rows = documents()
    with torch.no_grad():
        found, expected = made.module.eval()(pack(rows)), wrap_plain(folder)(pack(rows))
    assert torch.equal(found, expected)


def test_an_fp8_model_is_trained_as_a_plain_one(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = distinct(tiny_models["deepseek-v3"], tmp_path / "fp8")
    meant = to_fp8(folder)
    made = built(folder)
    assert {p.dtype for p in made.module.parameters() if not p.requires_grad} == {HALF}
    assert {p.dtype for p in made.module.parameters() if p.requires_grad} == {FLOAT}
    name = "layers.1.self_attn.q_a_proj"
    expected = meant[f"model.{name}.weight"]
    found = made.read(f"model.base_model.model.model.{name}.base_layer.weight", 0, expected.numel())
    assert torch.equal(found, expected.reshape(-1))


def test_targets_that_match_nothing(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'c_attn' matches no linear layer"):
        built(folders["llama"], targets=["c_attn"])


def test_weights_that_are_not_there(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = distinct(tiny_models["llama"], tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{folder}: has no weights"):
        built(folder)


@pytest.mark.parametrize(("architecture", "layers"), [("deepseek_v3", 61), ("deepseek_v2", 60)])
def test_a_model_of_the_real_size_is_described_in_little_memory(
    tmp_path: Path, architecture: str, layers: int
) -> None:
    """One layer's experts would take more memory than most machines have."""
    from transformers import AutoConfig

    AutoConfig.for_model(architecture, num_hidden_layers=layers).save_pretrained(tmp_path)
    before = psutil.Process().memory_info().rss
    model = skeleton(ModelConfig(name=str(tmp_path)))
    assert sum(p.numel() for p in model.parameters()) > 50e9
    assert all(p.is_meta for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert psutil.Process().memory_info().rss - before < 1 << 30
