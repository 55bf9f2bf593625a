"""Merged models: plain transformers computes with one what peft computes with the base model and the adapter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ds import wrapped
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.merge import Merged
from raytune_ds.origin import Origin
from raytune_ds.takehome import Request, deliver
from tests.unit.test_weights import edit_config, store, stored, tie, to_fp8

FLOAT, HALF = torch.float32, torch.bfloat16
IDS = torch.arange(5, 45)[None]
MLA = ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]
PLAIN = ["q_proj", "v_proj", "down_proj"]
TARGETS = {
    "deepseek-v2": ["q_proj", "kv_b_proj", "o_proj"],
    "deepseek-v3": MLA,
    "deepseek-v3.2": MLA,
    "deepseek-v4": ["q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"],
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "llama": PLAIN,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

pytestmark = pytest.mark.usefixtures("one_thread")


def lora(targets: Any, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)


def loaded(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def make_adapter(base: Path, config: Any, target: Path, rows: int | None = None) -> Path:
    """A peft directory with random weights in place of all that would be trained."""
    torch.manual_seed(0)  # peft draws A
    generator = torch.Generator().manual_seed(3)
    model = loaded(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    tuned.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def merged_from(base: Path, adapter: Path, target: Path, **how: Any) -> Path:
    deliver(Origin(adapter, ModelConfig(name=str(base))), Request("merged", target, **how))
    return target


Make = Callable[..., tuple[Path, Path, Path]]


@pytest.fixture
def make(folders: dict[str, Path], tmp_path: Path) -> Make:
    """Makes an adapter of a base model and merges it; returns base, adapter and merged model."""

    def start(base: str | Path, config: Any, rows: int | None = None) -> tuple[Path, Path, Path]:
        folder = folders[base] if isinstance(base, str) else base
        adapter = make_adapter(folder, config, tmp_path / "adapter", rows)
        return folder, adapter, merged_from(folder, adapter, tmp_path / "merged")

    return start


def assert_same(
    base: Path, adapter: Path, merged: Path, tolerance: float = 1e-5, rows: int | None = None
) -> None:
    bare = loaded(base, FLOAT)
    before = logits(bare)
    if rows is not None:
        bare.resize_token_embeddings(rows, mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(bare, str(adapter)))
    found = logits(loaded(merged, FLOAT))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.std() * 10
    assert (before - expected[..., : before.shape[-1]]).abs().max() > 1e-3, "the adapter does something"


# ---- LoRA and its kin -----------------------------------------------------------------------------


# What rsLoRA changes is a factor; and to DoRA the three plain architectures are one.
ALIKE = [("use_rslora", name) for name in TARGETS if name not in ("deepseek-v3", "llama")] + [
    ("use_dora", name) for name in ("qwen2", "qwen3")
]


@pytest.mark.parametrize(("option", "architecture"), [
    pytest.param(option, name, marks=[pytest.mark.slow] * ((option, name) in ALIKE))
    for option in ("plain", "use_rslora", "use_dora")
    for name in TARGETS
])  # fmt: skip
def test_lora_on_linear_layers(make: Make, architecture: str, option: str) -> None:
    options = {} if option == "plain" else {option: True}
    base, adapter, merged = make(architecture, lora(TARGETS[architecture], **options))
    assert_same(base, adapter, merged)
    ours, theirs = load_file(merged / "model.safetensors"), stored(base)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    touched = tuple(f"{target}.weight" for target in TARGETS[architecture])
    found = loaded(merged).state_dict()
    for name, tensor in loaded(base).state_dict().items():
        if "experts" not in name:  # peft moves names of linear layers there
            assert torch.equal(found[name], tensor) != name.endswith(touched), name


@pytest.mark.parametrize("architecture", [name for name in TARGETS if "deepseek" in name])
@pytest.mark.parametrize("at_once", [1 << 28, 1], ids=["all", "one"])
def test_lora_on_experts_and_other_parameters(
    make: Make, architecture: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapped, "PART_BYTES", at_once)
    parameters = [*EXPERTS, "mlp.gate.weight", f"{TARGETS[architecture][0]}.weight"]
    base, adapter, merged = make(architecture, lora(TARGETS[architecture][-1:], target_parameters=parameters))
    assert_same(base, adapter, merged)
    ours, theirs = load_file(merged / "model.safetensors"), stored(base)
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert {n for n in theirs if ".mlp.experts." in n or n.endswith("mlp.gate.weight")} <= changed


def test_lora_on_the_weights_of_linear_layers(make: Make) -> None:
    assert_same(*make("qwen2", lora(["v_proj"], target_parameters=["q_proj.weight", "k_proj.weight"])))


@pytest.mark.parametrize("config", [
    lora(["embed_tokens", "lm_head", "q_proj"]),
    lora(["q_proj"], bias="all"),
    lora(["q_proj"], bias="lora_only"),
    lora(["q_proj"], lora_bias=True),
    lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    lora(["q_proj"], modules_to_save=["norm", "layers.1.mlp"]),
    lora(["q_proj"], trainable_token_indices=[5, 6, 9]),
    lora(["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 32}),
    peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], save_projection=False),
    peft.LoHaConfig(r=4, target_modules=PLAIN),
    peft.LoKrConfig(r=4, target_modules=PLAIN),
    peft.OFTConfig(oft_block_size=16, target_modules=PLAIN),
    peft.BOFTConfig(boft_block_size=16, target_modules=["q_proj", "o_proj"]),
    peft.HRAConfig(r=4, target_modules=PLAIN),
    peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=PLAIN),
    peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    peft.FourierFTConfig(n_frequency=100, target_modules=["q_proj", "o_proj"]),
], ids=lambda c: f"{c.peft_type.value}-{getattr(c, 'bias', '')}")  # fmt: skip
def test_every_kind_that_peft_merges(make: Make, config: Any) -> None:
    config.task_type = "CAUSAL_LM"
    assert_same(*make("qwen2", config))


def test_what_is_in_bfloat16_stays_so_and_is_rounded_once(
    folders: dict[str, Path], tmp_path: Path, make: Make
) -> None:
    base = in_bfloat16(folders["deepseek-v3"], tmp_path / "base")
    base, adapter, merged = make(base, lora(MLA, target_parameters=EXPERTS))
    ours, theirs = load_file(merged / "model.safetensors"), stored(base)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert ours["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == FLOAT
    # By hand, in the precision of the adapter.
    file = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.3.self_attn.q_b_proj"):
        a, b = (file[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        expected = (theirs[f"{name}.weight"].float() + 6 / 4 * (b @ a)).to(HALF)
        assert torch.equal(ours[f"{name}.weight"], expected)
    assert loaded(merged).dtype == HALF
    assert_same(base, adapter, merged, 1e-2)


def in_bfloat16(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    store(target, {n: t if "e_score" in n else t.to(HALF) for n, t in stored(source).items()})
    edit_config(target, dtype="bfloat16")
    return target


def test_a_base_that_was_published_in_fp8_becomes_bfloat16(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    plain = in_bfloat16(folders["deepseek-v3"], tmp_path / "plain")
    published = shutil.copytree(plain, tmp_path / "published")
    meant = to_fp8(published)
    adapter = make_adapter(plain, lora(MLA), tmp_path / "adapter")
    merged = merged_from(published, adapter, tmp_path / "merged")
    ours = load_file(merged / "model.safetensors")
    assert ours.keys() == meant.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(ours[name], meant[name].to(HALF))
    assert "quantization_config" not in (merged / "config.json").read_text()
    store(plain, {n: t.to(stored(plain)[n].dtype) for n, t in meant.items()})
    assert_same(plain, adapter, merged, 1e-2)


# ---- vocabularies ---------------------------------------------------------------------------------


@pytest.fixture
def tied(folders: dict[str, Path], tmp_path: Path) -> Path:
    import shutil

    folder = shutil.copytree(folders["qwen2"], tmp_path / "tied")
    tie(folder)
    return folder


@pytest.mark.parametrize(("config", "stays_tied"), [
    (lora(["q_proj"]), True),
    (lora(["q_proj", "embed_tokens"]), False),
    (lora(["q_proj"], modules_to_save=["embed_tokens"]), False),
    (lora(["q_proj"], modules_to_save=["lm_head"]), False),
    (lora(["q_proj"], trainable_token_indices=[5, 6, 9]), True),
    (lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
], ids=range(6))  # fmt: skip
def test_tied_embeddings_stay_tied_only_where_the_adapter_keeps_them_so(
    make: Make, tied: Path, config: Any, stays_tied: bool
) -> None:
    base, adapter, merged = make(tied, config)
    assert_same(base, adapter, merged)
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) != stays_tied
    assert loaded(merged).config.tie_word_embeddings == stays_tied


@pytest.mark.parametrize("ends", [
    {"modules_to_save": ["embed_tokens", "lm_head"]},
], ids=["whole"])  # fmt: skip
def test_a_vocabulary_that_has_grown(make: Make, ends: dict[str, Any], folders: dict[str, Path]) -> None:
    rows = loaded(folders["qwen2"]).config.vocab_size + 5
    base, adapter, merged = make("qwen2", lora(["q_proj"], **ends), rows)
    assert_same(base, adapter, merged, rows=rows)
    assert loaded(merged).config.vocab_size == rows


def test_single_new_tokens_of_a_tied_vocabulary(make: Make, tied: Path) -> None:
    rows = loaded(tied).config.vocab_size + 3
    config = lora(["q_proj"], trainable_token_indices=[5, rows - 3, rows - 2, rows - 1])
    base, adapter, merged = make(tied, config, rows)
    assert_same(base, adapter, merged, rows=rows)


def test_new_tokens_that_nobody_trained_are_refused(make: Make, tied: Path) -> None:
    rows = loaded(tied).config.vocab_size + 3
    config = lora(["q_proj"], trainable_token_indices=[5, rows - 1])
    with pytest.raises(UserError, match="does not hold the new rows"):
        make(tied, config, rows)
    assert not (tied.parent / "merged").exists()


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "message"), [
    (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "has no layers"),
    (lora(["q_proj"], alora_invocation_tokens=[5, 6]), "does not merge"),
], ids=["prompt", "alora"])  # fmt: skip
def test_what_can_not_be_merged_says_so(make: Make, config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make("qwen2", config)
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter"}


def test_an_adapter_that_changes_its_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(
        folders["llama"], lora(["q_proj"], init_lora_weights="olora"), tmp_path / "adapter"
    )
    with pytest.raises(UserError, match="relative to a base model of its own"):
        merged_from(folders["llama"], adapter, tmp_path / "merged")


def test_an_incomplete_adapter_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(folders["llama"], lora(["q_proj"]), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"is incomplete.*layers\.2"):
        merged_from(folders["llama"], adapter, tmp_path / "merged")


# ---- how it is done -------------------------------------------------------------------------------


def test_no_more_than_a_layer_is_in_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of the base model is real but what was asked for, before and after."""
    config = lora(MLA, target_parameters=EXPERTS)
    adapter = make_adapter(folders["deepseek-v3"], config, tmp_path / "adapter")
    merged = Merged(ModelConfig(name=str(folders["deepseek-v3"])), adapter)
    originals = merged._wrapped._originals[""]

    def real() -> list[str]:
        return [
            n
            for n, p in originals.named_parameters()
            if "lora_" not in n and p.ndim > 1 and 0 not in p.stride()
        ]

    assert real() == []
    for name in merged.shapes:
        merged(name)
        assert real() == [], name


def test_a_fresh_process_loads_it_with_plain_transformers(make: Make) -> None:
    base, adapter, merged = make("deepseek-v3", lora(MLA, use_dora=True))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "m = A.from_pretrained(sys.argv[1], dtype='auto').eval(); T.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(5, 45)[None]\n"
        "with torch.no_grad(): torch.save(m(input_ids=ids).logits, sys.argv[1] + '/found.pt')\n"
        "assert not any(n.startswith(('raytune_ds', 'peft')) for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(merged)], check=True, cwd=merged)
    found = torch.load(merged / "found.pt")
    expected = logits(PeftModel.from_pretrained(loaded(base, FLOAT), str(adapter)))
    assert (found - expected).abs().max() < 1e-5
