"""A base model's weights read by ranges: the same numbers as transformers loads, whatever form the files have."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model.folder import fingerprint
from raytune_ds.model.load import skeleton
from raytune_ds.model.weights import Weights, open_weights
from raytune_ds.tensorfile import TensorFile

ARCHITECTURES = ["deepseek-v2", "deepseek-v3", "qwen2", "llama"]
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 128
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- model directories ----------------------------------------------------------------------------


def stored(folder: Path) -> Tensors:
    return load_file(folder / FILE)


def store(folder: Path, tensors: Tensors, name: str = FILE) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def distinct(source: Path, target: Path) -> Path:
    """A copy of a tiny model in which no two vectors are the same: all norms of a new one are, and biases are zero."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(0)
    tensors = stored(target)
    vectors = {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items() if t.ndim == 1}
    store(target, tensors | vectors)
    return target


def quantized(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block by block to (FP8, scales, what the two stand for in bfloat16)."""
    fp8 = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(matrix.shape, dtype=torch.bfloat16)
    scales = torch.empty([-(-size // BLOCK) for size in matrix.shape])
    for row, column in torch.cartesian_prod(*(torch.arange(n) for n in scales.shape)).tolist():
        block = tuple(slice(i * BLOCK, (i + 1) * BLOCK) for i in (row, column))
        scales[row, column] = matrix[block].abs().max() / 448
        fp8[block] = (matrix[block] / scales[row, column]).to(torch.float8_e4m3fn)
        meant[block] = (fp8[block].float() * scales[row, column]).bfloat16()
    return fp8, scales, meant


def to_fp8(folder: Path) -> Tensors:
    """Makes a model directory one as DeepSeek publishes; returns what its entries stand for."""
    published, meant = stored(folder), stored(folder)
    for name, tensor in stored(folder).items():
        # Their embeddings, heads, routers and norms are not quantized.
        if name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name:
            # Blocks of unlike size, so that a scale at the wrong place shows.
            tensor = tensor * torch.logspace(0, 1, tensor.numel()).view(tensor.shape)
            published[name], published[f"{name}_scale_inv"], meant[name] = quantized(tensor)
    store(folder, published)
    edit_config(folder, quantization_config=FP8)
    return meant


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, Tensors]:
    """What transformers loads of each: parameters, and the buffers that are saved."""
    return {name: loaded(path) for name, path in folders.items()}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy that a test may change."""

    def copy(architecture: str) -> Path:
        return shutil.copytree(folders[architecture], tmp_path / architecture)

    return copy


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Tensors:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict())


def opened(folder: Path) -> Weights:
    return open_weights(folder, skeleton(ModelConfig(name=str(folder))))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder)
    return str(caught.value)


def assert_reads(found: Weights, expected: Tensors) -> None:
    """All of every tensor, and 20 ranges of it, in an order that no cache helps with."""
    rng = random.Random(0)
    asked = [(name, 0, tensor.numel()) for name, tensor in expected.items()]
    for name, tensor in expected.items():
        for _ in range(20):
            start, stop = sorted(rng.sample(range(tensor.numel() + 1), 2))
            asked.append((name, start, stop))
    rng.shuffle(asked)
    for name, start, stop in asked:
        values = found(name, start, stop)
        assert values.shape == (stop - start,)
        assert torch.equal(values.to(expected[name].dtype), expected[name].reshape(-1)[start:stop]), (
            f"{name} [{start}, {stop})"
        )


# ---- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_range_equals_what_transformers_loads(
    folders: dict[str, Path], plain: dict[str, Tensors], architecture: str
) -> None:
    found = opened(folders[architecture])
    assert_reads(found, plain[architecture])
    assert all(name in found for name in plain[architecture])
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in found


def test_values_come_in_the_dtype_of_the_file(copied: Callable[[str], Path]) -> None:
    folder = copied("deepseek-v3")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    store(
        folder, {name: t if "e_score" in name else t.to(torch.bfloat16) for name, t in stored(folder).items()}
    )
    found = opened(folder)
    assert_reads(found, loaded(folder, torch.bfloat16))
    assert found(bias, 0, 8).dtype == torch.float32
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.down_proj"):
        assert found(name, 0, 9).dtype == torch.bfloat16


def many_experts(source: Path, target: Path) -> Path:
    """A directory of a new model with more experts than names of one digit."""
    config = AutoConfig.from_pretrained(source)
    config.n_routed_experts, config.num_hidden_layers = 12, 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("architecture", ["deepseek-v2", "deepseek-v3"])
def test_the_tenth_expert_comes_behind_the_ninth(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    folder = many_experts(folders[architecture], tmp_path / "many")
    assert_reads(opened(folder), loaded(folder))
    expert = stored(folder)["model.layers.1.mlp.experts.10.down_proj.weight"]
    size = expert.numel()
    found = opened(folder)("model.layers.1.mlp.experts.down_proj", 10 * size, 11 * size)
    assert torch.equal(found, expert.reshape(-1))


# ---- what is read ---------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(entry, elements) of everything that is read from safetensors files."""
    seen: list[tuple[str, int]] = []
    read = TensorFile.read

    def note(self: TensorFile, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        values = read(self, name, start, stop)
        seen.append((name, values.numel()))
        return values

    monkeypatch.setattr(TensorFile, "read", note)
    return seen


def expert_entries(experts: range, *projections: str) -> set[str]:
    return {f"model.layers.2.mlp.experts.{i}.{p}.weight" for i in experts for p in projections}


@pytest.mark.parametrize("architecture", ["deepseek-v2", "deepseek-v3"])
def test_a_range_of_experts_reads_their_entries_only(
    folders: dict[str, Path], reads: list[tuple[str, int]], architecture: str
) -> None:
    found = opened(folders[architecture])
    assert reads == [], "opening reads headers only"
    width, hidden = 96, 128
    for name, projections, size in [
        ("gate_up_proj", ("gate_proj", "up_proj"), 2 * width * hidden),
        ("down_proj", ("down_proj",), width * hidden),
    ]:
        for start, stop, experts in [
            (3 * size, 4 * size, range(3, 4)),
            (5 * size + 7, 6 * size - 7, range(5, 6)),
            (2 * size - 1, 4 * size + 1, range(1, 5)),
        ]:
            reads.clear()
            found(f"model.layers.2.mlp.experts.{name}", start, stop)
            assert {entry for entry, _ in reads} == expert_entries(experts, *projections)
            assert len(reads) == len(experts) * len(projections), "each once"


def test_rows_of_a_matrix_are_read_without_the_rest(
    folders: dict[str, Path], reads: list[tuple[str, int]]
) -> None:
    found, name = opened(folders["llama"]), "model.layers.1.mlp.up_proj.weight"  # 384x128
    found(name, 10 * 128, 12 * 128)
    found(name, 10 * 128 + 5, 11 * 128 + 5)
    found(name, 383 * 128, 384 * 128)
    assert reads == [(name, 256), (name, 256), (name, 128)]


# ---- forms of files -------------------------------------------------------------------------------


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Deals the entries out to several files, so that the halves of an expert lie apart; returns where each went."""
    tensors = stored(folder)
    where = {
        entry: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, entry in enumerate(tensors)
    }
    for file in set(where.values()):
        store(folder, {entry: t for entry, t in tensors.items() if where[entry] == file}, file)
    (folder / FILE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sharded_directory(
    copied: Callable[[str], Path], plain: dict[str, Tensors], architecture: str
) -> None:
    folder = copied(architecture)
    shard(folder)
    # Files that the index does not name are none of the model's.
    store(folder, {"model.norm.weight": torch.zeros(128)}, "model-00009-of-00009.safetensors")
    store(folder, {"model.norm.weight": torch.zeros(128)}, "adapter_model.safetensors")
    assert_reads(opened(folder), plain[architecture])


def test_several_files_without_an_index(copied: Callable[[str], Path], plain: dict[str, Tensors]) -> None:
    folder = copied("deepseek-v3")
    shard(folder)
    (folder / INDEX).unlink()
    store(folder, {"model.norm.weight": torch.zeros(128)}, "adapter_model.safetensors")
    assert_reads(opened(folder), plain["deepseek-v3"])


@pytest.mark.parametrize("architecture", ["deepseek-v3", "qwen2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_files(
    copied: Callable[[str], Path], plain: dict[str, Tensors], architecture: str, sharded: bool
) -> None:
    folder = copied(architecture)
    tensors = stored(folder)
    (folder / FILE).unlink()
    entries = list(tensors)
    parts = [entries[0::2], entries[1::2]] if sharded else [entries]
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save({entry: tensors[entry] for entry in part}, folder / name)
    if sharded:
        where = {entry: name for name, part in zip(names, parts, strict=True) for entry in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save({"lr": 1.0}, folder / "training_args.bin")  # what trainers leave beside them
    assert_reads(opened(folder), plain[architecture])


def test_safetensors_are_taken_where_there_are_pickled_files_too(
    copied: Callable[[str], Path], plain: dict[str, Tensors]
) -> None:
    folder = copied("llama")
    torch.save(
        {name: torch.zeros_like(t) for name, t in stored(folder).items()}, folder / "pytorch_model.bin"
    )
    assert_reads(opened(folder), plain["llama"])


def test_entries_that_are_not_the_models_are_passed_over(
    copied: Callable[[str], Path], plain: dict[str, Tensors]
) -> None:
    folder = copied("deepseek-v3")
    tensors = stored(folder)
    # The layer that predicts one token more, which DeepSeek-V3 has behind its last one ...
    extra = {
        name.replace("layers.3.", "layers.4."): torch.full_like(tensor, 7)
        for name, tensor in tensors.items()
        if "layers.3." in name
    }
    others = ("embed_tokens.weight", "eh_proj.weight", "enorm.weight", "shared_head.head.weight")
    extra |= {f"model.layers.4.{name}": torch.full((128, 128), 7.0) for name in others}
    # ... and what files of before transformers 4.30 have.
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    store(folder, tensors | extra)
    found = opened(folder)
    assert_reads(found, plain["deepseek-v3"])
    assert not any(name in found for name in extra)


def tie(folder: Path) -> None:
    """Makes a model directory one whose head is its embedding, which its files then hold once."""
    edit_config(folder, tie_word_embeddings=True)
    tensors = stored(folder)
    del tensors["lm_head.weight"]
    store(folder, tensors)


@pytest.mark.parametrize("architecture", ["llama", "deepseek-v3"])
def test_tied_embeddings(copied: Callable[[str], Path], architecture: str) -> None:
    folder = copied(architecture)
    tie(folder)
    model = skeleton(ModelConfig(name=str(folder)))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    found = open_weights(folder, model)
    assert_reads(found, {name: parameter.detach() for name, parameter in expected.named_parameters()})


# ---- FP8 as DeepSeek publishes --------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sharded", [False, True])
def test_block_fp8_is_scaled_back(copied: Callable[[str], Path], architecture: str, sharded: bool) -> None:
    folder = copied(architecture)
    original = stored(folder)
    meant = to_fp8(folder)
    shapes = {tuple(t.shape) for t in stored(folder).values() if t.dtype == torch.float8_e4m3fn}
    assert any(size > BLOCK for shape in shapes for size in shape)
    if architecture == "deepseek-v3":
        assert {(192, 96), (80, 128)} <= shapes, (
            "no multiples of the block, with a cut block behind a whole one"
        )
    if sharded:
        shard(folder)  # scales in other files than what they scale
    dequantized = shutil.copytree(folder, folder.parent / "dequantized")
    shutil.copy(folder.parent / "dequantized" / "config.json", folder.parent / "fp8.json")
    for path in dequantized.glob("model*"):
        path.unlink()
    config = json.loads((dequantized / "config.json").read_text())
    del config["quantization_config"]
    (dequantized / "config.json").write_text(json.dumps(config))
    store(dequantized, meant)
    found = opened(folder)
    assert_reads(found, loaded(dequantized))
    assert found("model.layers.0.self_attn.o_proj.weight", 0, 4).dtype == torch.bfloat16
    assert found("lm_head.weight", 0, 4).dtype == original["lm_head.weight"].dtype


def test_a_block_may_have_another_size(copied: Callable[[str], Path]) -> None:
    folder, name = copied("llama"), "model.layers.0.mlp.up_proj.weight"  # 384x128
    tensors = stored(folder)
    fp8 = tensors[name].to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 9.0).view(4, 2)
    store(folder, tensors | {name: fp8, f"{name}_scale_inv": scales})
    edit_config(folder, quantization_config=FP8 | {"weight_block_size": [96, 64]})
    expected = fp8.float()
    for row in range(384):
        for column in range(128):
            expected[row, column] *= scales[row // 96, column // 64]
    assert torch.equal(opened(folder)(name, 0, 384 * 128), expected.bfloat16().reshape(-1))


def test_a_skeleton_of_a_quantized_model_is_a_plain_one(copied: Callable[[str], Path]) -> None:
    folder = copied("deepseek-v3")
    names = [name for name, _ in skeleton(ModelConfig(name=str(folder))).named_parameters()]
    to_fp8(folder)
    model = skeleton(ModelConfig(name=str(folder)))
    assert [name for name, _ in model.named_parameters()] == names
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "fp8", "activation_scheme": "dynamic"},  # one scale a matrix
    ],
    ids=lambda quantization: quantization["quant_method"],
)
def test_other_quantizations_are_refused_by_name(
    copied: Callable[[str], Path], quantization: dict[str, Any]
) -> None:
    folder = copied("llama")
    edit_config(folder, quantization_config=quantization)
    with pytest.raises(UserError) as caught:
        skeleton(ModelConfig(name=str(folder)))
    assert f"its weights are quantized ({quantization['quant_method']})" in str(caught.value)
    assert str(folder) in str(caught.value)


# ---- refusals -------------------------------------------------------------------------------------


def without(folder: Path, *entries: str) -> None:
    store(folder, {name: tensor for name, tensor in stored(folder).items() if name not in entries})


def test_missing_weights_are_named(copied: Callable[[str], Path]) -> None:
    folder = copied("qwen2")
    without(folder, "model.layers.2.self_attn.k_proj.bias")
    message = refusal(folder)
    assert f"{folder}: its files hold no weights for model.layers.2.self_attn.k_proj.bias;" in message
    without(folder, *(name for name in stored(folder) if "layers.3." in name))
    message = refusal(folder)
    assert "layers.2.self_attn.k_proj.bias, model.layers.3." in message
    assert "and 10 more" in message


@pytest.mark.parametrize(
    "projections", [("up_proj",), ("gate_proj",), ("down_proj",), ("gate_proj", "up_proj", "down_proj")]
)
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_a_missing_expert_is_noticed(
    copied: Callable[[str], Path], projections: tuple[str, ...], expert: int
) -> None:
    # With one entry fewer all experts behind it would move up by one.
    folder = copied("deepseek-v3")
    without(folder, *(f"model.layers.2.mlp.experts.{expert}.{name}.weight" for name in projections))
    message = refusal(folder)
    assert str(folder) in message
    assert "model.layers.2.mlp.experts." in message


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("model.layers.1.self_attn.o_proj.weight", None),
        ("model.norm.weight", None),
        ("model.layers.1.mlp.gate.e_score_correction_bias", None),
        ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_wrong_shapes_are_named(copied: Callable[[str], Path], entry: str, name: str | None) -> None:
    folder = copied("deepseek-v3")
    tensors = stored(folder)
    store(folder, tensors | {entry: tensors[entry][:-1]})
    message = refusal(folder)
    assert str(folder) in message
    assert (name or entry) in message
    if name is None:
        shape = list(tensors[entry].shape)
        assert (
            f"has shape {[shape[0] - 1, *shape[1:]]} in the files, and {shape} by its config.json" in message
        )


def test_a_transposed_matrix_is_noticed(copied: Callable[[str], Path]) -> None:
    folder, name = copied("llama"), "model.layers.1.mlp.up_proj.weight"
    tensors = stored(folder)
    store(folder, tensors | {name: tensors[name].T})
    assert f"{name} has shape [128, 384]" in refusal(folder)


def test_a_directory_without_weights(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    (folder / FILE).unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "training_args.bin").write_bytes(b"")
    assert refusal(folder) == f"model.name: {folder}: has no weights (*.safetensors or pytorch_model*.bin)."
    with pytest.raises(UserError, match="has no weights"):
        fingerprint(folder)


def test_an_index_that_names_missing_files(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    names = sorted(set(shard(folder).values()))
    for name in names[1:]:
        (folder / name).unlink()
    message = refusal(folder)
    assert str(folder) in message
    assert INDEX in message
    assert all(name in message for name in names[1:])
    assert names[0] not in message


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))
        return FILE

    return damage


def damage_index(content: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        shard(folder)
        (folder / INDEX).write_text(content)
        return INDEX

    return damage


def damage_pickle(change: Callable[[bytes], bytes] = bytes, content: Any = None) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        name = "pytorch_model.bin"
        torch.save(stored(folder) if content is None else content, folder / name)
        (folder / FILE).unlink()
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return name

    return damage


DAMAGES: dict[str, Callable[[Path], str]] = {
    "empty": rewrite(lambda content: b""),
    "a few bytes": rewrite(lambda content: content[:5]),
    "header cut off": rewrite(lambda content: content[:1000]),
    # A download that broke off: the header is whole.
    "data cut off": rewrite(lambda content: content[:-1000]),
    "header overwritten": rewrite(lambda content: content[:100] + b"\xff" * 50 + content[150:]),
    "zeros": rewrite(lambda content: bytes(len(content))),
    "a list for a header": rewrite(lambda content: (2).to_bytes(8, "little") + b"[]"),
    # What git clone leaves where git-lfs is not installed.
    "git-lfs": rewrite(
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    ),
    "index cut off": damage_index('{"weight_map": {"lm_head.we'),
    "index without a map": damage_index("{}"),
    "pickle empty": damage_pickle(lambda content: b""),
    "pickle cut off": damage_pickle(lambda content: content[:-500]),
    "pickled code": damage_pickle(content={"lm_head.weight": Path("/")}),
    "pickled list": damage_pickle(content=[torch.ones(3)]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(copied: Callable[[str], Path], damage: Callable[[Path], str]) -> None:
    folder = copied("llama")
    name = damage(folder)
    assert f"{folder}/{name}: " in refusal(folder)


# ---- the fingerprint ------------------------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint(folders: dict[str, Path], copied: Callable[[str], Path]) -> None:
    folder = copied("deepseek-v3")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    (folder / "README.md").write_text("notes")
    (folder / "training_args.bin").write_bytes(b"x")
    assert fingerprint(folder) == fingerprint(folders["deepseek-v3"])
    assert len({fingerprint(path) for path in folders.values()}) == len(folders)


def scaled(folder: Path) -> None:
    """As if it had been trained on: every weight a bit different, the sizes the same."""
    store(folder, {name: tensor * 1.001 for name, tensor in stored(folder).items()})


CHANGES: dict[str, Callable[[Path], Any]] = {
    "trained on": scaled,
    "one layer trained on": lambda folder: store(
        folder, {n: t + 1e-3 if "layers.2." in n else t for n, t in stored(folder).items()}
    ),
    "an entry more": lambda folder: store(folder, stored(folder) | {"extra": torch.zeros(1)}),
    "config": lambda folder: edit_config(folder, rope_theta=5e5),
    "other files": shard,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_changes_with_weights_and_config(
    copied: Callable[[str], Path], change: Callable[[Path], Any]
) -> None:
    folder = copied("llama")
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_the_fingerprint_is_of_all_files(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    seen = set()
    for file in ("none of them", *sorted(set(shard(folder).values()))):
        if (folder / file).exists():
            changed = {name: tensor * 1.001 for name, tensor in load_file(folder / file).items()}
            store(folder, changed, file)
        seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_samples_are_taken_all_over_the_files(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model is far larger than its samples; here too, so that reading all of it does not pass for sampling.
    monkeypatch.setattr("raytune_ds.model.folder._SAMPLE_BYTES", 16)
    folder = copied("llama")
    content = (folder / FILE).read_bytes()
    before, block = fingerprint(folder), len(content) // 16
    for number in range(16):
        changed = bytearray(content)
        changed[number * block : (number + 1) * block] = bytes(
            b ^ 1 for b in changed[number * block :][:block]
        )
        (folder / FILE).write_bytes(changed)
        assert fingerprint(folder) != before, f"part {number} of 16"
