"""Weights in few bits: which of them, what they become, and that training with them is training with what they stand
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.engines.fill import fill
from raytune_ds.errors import UserError
from raytune_ds.model import lowbits, quantize
from raytune_ds.model.build import Built, build
from raytune_ds.model.flops import Flops
from raytune_ds.model.load import hold_in, load_for_generation, skeleton
from raytune_ds.model.lowbits import low_bits
from raytune_ds.model.weights import open_weights
from raytune_ds.world import World
from tests.matrix.cases import micro_batches

FLOAT, HALF = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
ARCHITECTURES = ("deepseek-v2", "deepseek-v3", "qwen2", "llama")

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("bitsandbytes")


def format_or_skip(name: str) -> lowbits.LowBits:
    try:
        return low_bits(name)
    except UserError:
        pytest.skip("torchao is not installed")


def built(folder: Path, quantization: str, dtype: torch.dtype = FLOAT, **adapter: Any) -> Built:
    made = build(
        ModelConfig(name=str(folder), quantization=quantization),
        AdapterConfig(**{"r": 4, "alpha": 8.0, **adapter}),
        seed=0,
        dtype=dtype,
        trained_dtype=FLOAT,
    )
    fill(made.module, made.read, World.alone())
    return made


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def give_adapter_a_say(module: nn.Module) -> None:
    """A fresh adapter adds nothing, and half of it has no gradient."""
    torch.manual_seed(1)
    for parameter in trained(module).values():
        parameter.data = torch.randn_like(parameter) * 0.1


def as_seen(folder: Path, quantization: str, dtype: torch.dtype = FLOAT, **adapter: Any) -> Built:
    """A model without quantisation that holds what the quantised one computes with."""
    made = built(folder, "none", dtype, **adapter)
    base = skeleton(ModelConfig(name=str(folder)))
    hold_in(base, dtype)
    read = quantize.dequantised(open_weights(folder, base), base, quantization)
    for name, parameter in base.named_parameters():
        values = read(name, 0, parameter.numel()).view(parameter.shape).to(dtype)
        ours = next(
            p
            for n, p in made.module.named_parameters()
            if n.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer", "") == name
        )
        ours.data.copy_(values)
    return made


# ---- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, although it is made piece by piece."""
    from bitsandbytes import functional as bnb

    monkeypatch.setattr(lowbits.Nf4, "_PIECE", 1 << 12)
    values = torch.randn(130, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = low_bits("nf4").pack(values)
    assert torch.equal(packed[: codes.numel()], codes.view(-1))
    assert torch.equal(low_bits("nf4").unpack(packed, values.shape, dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize(("name", "limit"), [("nf4", 0.11), ("int8", 0.01), ("int4", 0.12), ("fp8", 0.03)])
@pytest.mark.parametrize("shape", [(96, 128), (4, 48, 64), (7, 33)])
def test_values_come_back(name: str, limit: float, shape: tuple[int, ...]) -> None:
    bits = format_or_skip(name)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype in (FLOAT, HALF):
        packed = bits.pack(values.to(dtype))
        assert (packed.dtype, packed.shape) == (torch.uint8, (bits.nbytes(shape),))
        assert torch.equal(packed, bits.pack(values.to(dtype)))
        back = bits.unpack(packed, shape, dtype)
        assert (back.dtype, back.shape) == (dtype, values.shape)
        assert float((back.float() - values).abs().mean() / values.abs().mean()) < limit
        # Engines may have gathered the bytes into any place.
        shifted = torch.cat([packed.new_zeros(1), packed])[1:]
        assert torch.equal(bits.unpack(shifted, shape, dtype), back)
    assert not bits.unpack(bits.pack(torch.zeros(shape)), shape, FLOAT).any()


# ---- which of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_layers_and_routed_experts_are_quantised(folders: dict[str, Path], architecture: str) -> None:
    made = built(folders[architecture], "nf4", HALF)
    names = {name.rpartition(".model.")[2]: p for name, p in made.module.named_parameters()}
    packed = {name for name, p in names.items() if p.dtype == torch.uint8}
    assert all(".parametrizations." in name for name in packed)
    plain = {n.rpartition(".")[0].rpartition(".")[2] for n in names.keys() - packed if "lora_" not in n}
    # Embedding, head, norms and routers.
    assert all("norm" in n or n in ("embed_tokens", "lm_head", "gate", "base_layer") for n in plain), plain
    experts = {name for name in packed if ".experts." in name}
    assert len(experts) == (6 if "deepseek" in architecture else 0)
    per_layer = len(packed - experts) / 4
    assert per_layer >= 7 - 3 * ("deepseek" in architecture)
    assert not any(p.requires_grad for p in names.values() if p.dtype == torch.uint8)


def test_what_is_trained_is_not_quantised(folders: dict[str, Path]) -> None:
    made = built(folders["qwen2"], "nf4", bias="all")
    assert {p.dtype for p in trained(made.module).values()} == {FLOAT}
    assert sum("bias" in name for name in made.trained) == 12


def test_head_and_embedding_keep_their_dtype(folders: dict[str, Path]) -> None:
    made = built(folders["llama"], "nf4", HALF)
    assert made.base.get_output_embeddings().weight.dtype == HALF
    assert made.base.get_input_embeddings().weight.dtype == HALF


@pytest.mark.parametrize("architecture", ["deepseek-v3", "qwen2"])
def test_operations_are_counted_by_what_it_stands_for(folders: dict[str, Path], architecture: str) -> None:
    assert Flops.of(built(folders[architecture], "nf4")) == Flops.of(built(folders[architecture], "none"))


# ---- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [(architecture, "nf4") for architecture in ARCHITECTURES]
    + [("deepseek-v3", name) for name in ("int8", "int4", "fp8")],
)
def test_losses_and_gradients_are_those_of_what_it_stands_for(
    folders: dict[str, Path], architecture: str, quantization: str
) -> None:
    format_or_skip(quantization)
    ours, seen = built(folders[architecture], quantization), as_seen(folders[architecture], quantization)
    plain = built(folders[architecture], "none")
    (batch, *_) = micro_batches(0, 0, 1)
    losses = {}
    for made in (ours, seen, plain):
        give_adapter_a_say(made.module)
        loss = made.module(batch).mean()
        loss.backward()
        losses[id(made)] = float(loss.detach())
    assert losses[id(ours)] == pytest.approx(losses[id(seen)], rel=1e-6)
    assert losses[id(ours)] != pytest.approx(losses[id(plain)], rel=2e-6)
    for name, parameter in trained(seen.module).items():
        found = trained(ours.module)[name].grad
        assert found is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("architecture", ["deepseek-v3", "qwen2"])
def test_no_values_are_kept_for_the_backward_pass(
    folders: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a forward pass would hold the whole model in full once more."""
    made = built(folders[architecture], "nf4")
    storages: list[StorageWeakRef] = []
    real, most = quantize.Packing.unpack, 0

    def unpack(self: quantize.Packing, packed: torch.Tensor) -> torch.Tensor:
        nonlocal most
        values = real(self, packed)
        storages.append(StorageWeakRef(values.untyped_storage()))
        most = max(most, sum(not storage.expired() for storage in storages))
        return values

    monkeypatch.setattr(quantize.Packing, "unpack", unpack)
    (batch, *_) = micro_batches(0, 0, 1)
    loss = made.module(batch).mean()
    assert len(storages) == len(quantize.logical_shapes(made.module))  # each was made once
    assert all(storage.expired() for storage in storages)
    loss.backward()
    assert len(storages) > len(quantize.logical_shapes(made.module))
    assert most <= 2  # the two of a layer's experts


def test_an_adapter_of_quantised_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    """What peft puts on a parameter it takes away after a forward pass, and nothing is left the next time."""
    from peft import PeftModel

    folder = folders["deepseek-v3"]
    ours, seen = built(folder, "nf4", targets="experts"), as_seen(folder, "nf4", targets="experts")
    (batch, *_) = micro_batches(0, 0, 1)
    for made in (ours, seen):
        give_adapter_a_say(made.module)
    expected = seen.module(batch)
    for _ in range(3):
        assert torch.allclose(ours.module(batch), expected, rtol=1e-5, atol=1e-5)
    chains = [m for m in ours.module.modules() if isinstance(m, parametrize.ParametrizationList)]
    assert chains
    assert {len(chain) for chain in chains} == {1}
    for made in (ours, seen):
        made.module(batch).mean().backward()
    for name, parameter in trained(seen.module).items():
        gradient = trained(ours.module)[name].grad
        assert gradient is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-6), name
    # The same for generation.
    model: Any = ours.module.model
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = ModelConfig(name=str(folder), quantization="nf4")
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        before = load_for_generation(config, FLOAT, CPU)(input_ids=ids).logits
        found = load_for_generation(config, FLOAT, CPU, tmp_path)(input_ids=ids).logits
        plain: Any = load_for_generation(ModelConfig(name=str(folder)), FLOAT, CPU)
        skel = skeleton(ModelConfig(name=str(folder)))
        read = quantize.dequantised(open_weights(folder, skel), skel, "nf4")
        for name, parameter in plain.named_parameters():
            parameter.copy_(read(name, 0, parameter.numel()).view(parameter.shape))
        wanted = PeftModel.from_pretrained(plain, str(tmp_path)).eval()(input_ids=ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, wanted, rtol=1e-4, atol=1e-4)


# ---- elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_transformers_and_peft_compute_the_same(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """An adapter on a base that plain transformers has quantised, on ours, and in training."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = folders[architecture]
    made = built(folder, "nf4")
    give_adapter_a_say(made.module)
    made.module.model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=FLOAT,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=FLOAT,
        ),
    )
    config = ModelConfig(name=str(folder), quantization="nf4")
    ids = torch.arange(5, 45).view(1, -1)
    with torch.no_grad():
        # Not in evaluation mode, where bitsandbytes takes a CPU kernel that rounds to bfloat16.
        theirs = PeftModel.from_pretrained(plain, str(tmp_path)).train()(input_ids=ids).logits
        ours = load_for_generation(config, FLOAT, CPU, tmp_path)(input_ids=ids).logits
        unlike = ModelConfig(name=str(folder))
        other = load_for_generation(unlike, FLOAT, CPU, tmp_path)(input_ids=ids).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_sees_what_training_saw(folders: dict[str, Path], architecture: str) -> None:
    folder = folders[architecture]
    made = built(folder, "nf4")
    model: Any = load_for_generation(ModelConfig(name=str(folder), quantization="nf4"), FLOAT, CPU)
    ours = {n: p for n, p in made.module.named_parameters() if not p.requires_grad}
    theirs = dict(model.named_parameters())
    assert len(ours) == len(theirs)
    for name, parameter in ours.items():
        own = name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, theirs[own]), name
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 3


def test_a_range_of_what_was_seen(folders: dict[str, Path]) -> None:
    folder = folders["deepseek-v3"]
    base = skeleton(ModelConfig(name=str(folder)))
    hold_in(base, HALF)
    weights = open_weights(folder, base)
    read = quantize.dequantised(weights, base, "nf4")
    name = "model.layers.1.mlp.experts.down_proj"
    size = base.get_parameter(name).numel()
    whole = read(name, 0, size)
    assert (whole.dtype, whole.shape) == (HALF, (size,))
    assert torch.equal(read(name, 100, 333), whole[100:333])
    assert not torch.equal(whole, weights(name, 0, size).to(HALF))
    head = base.get_output_embeddings().weight.numel()
    assert torch.equal(read("lm_head.weight", 0, head), weights("lm_head.weight", 0, head))


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbits.importlib.util, "find_spec", lambda name: None)
    low_bits.cache_clear()
    for name, extra in (("nf4", "quantization"), ("fp8", "torchao")):
        with pytest.raises(UserError, match=rf"model.quantization = {name}: .* 'raytune_ds\[{extra}\]'"):
            low_bits(name)
    monkeypatch.undo()
    low_bits.cache_clear()
