"""An adapter of a quantised base model is merged into what it saw, in the precision of the files, not in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from raytune_ds import cli
from raytune_ds.config import ModelConfig
from raytune_ds.model.load import load_for_generation
from raytune_ds.model.lowbits import low_bits
from raytune_ds.origin import Origin
from raytune_ds.takehome import Request, deliver
from tests.unit.test_merge import EXPERTS, MLA, in_bfloat16, loaded, logits, lora, make_adapter
from tests.unit.test_weights import stored

FLOAT, HALF, CPU = torch.float32, torch.bfloat16, torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(base: Path, kind: str, adapter: Path | None = None) -> Any:
    return load_for_generation(ModelConfig(name=str(base), quantization=kind), FLOAT, CPU, adapter)


def origin(base: Path, adapter: Path, kind: str, **how: Any) -> Origin:
    return Origin(adapter, ModelConfig(name=str(base), quantization=kind, **how))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["deepseek-v3", "qwen2"])
def test_it_computes_what_the_quantised_model_with_the_adapter_does(
    folders: dict[str, Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    base = folders[architecture]
    config = lora(["q_proj"]) if architecture == "qwen2" else lora(MLA, target_parameters=EXPERTS)
    adapter = make_adapter(base, config, tmp_path / "adapter")
    deliver(origin(base, adapter, kind), Request("merged", tmp_path / "out"))
    expected = logits(quantized(base, kind, adapter))
    found = logits(loaded(tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    original = logits(PeftModel.from_pretrained(loaded(base), str(adapter)))
    assert (original - expected).abs().max() > 1e-3 * expected.std(), "not the base model that was quantised"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_in_the_precision_of_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    base = in_bfloat16(folders["qwen2"], tmp_path / "base")
    adapter = make_adapter(base, lora(["q_proj", "v_proj"]), tmp_path / "adapter")
    deliver(origin(base, adapter, "nf4", dtype="bfloat16"), Request("merged", tmp_path / "out"))
    ours, theirs = stored(tmp_path / "out"), stored(base)
    assert {tensor.dtype for tensor in ours.values()} == {HALF}
    name = "model.layers.0.mlp.up_proj.weight"
    bits = low_bits("nf4")
    assert torch.equal(ours[name], bits.unpack(bits.pack(theirs[name]), theirs[name].shape, HALF))
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])


def test_a_merge_into_four_bits_would_lose_what_was_learnt(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["qwen2"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "What does this word mean? It means that somebody asked a question and wants a short answer."
    ids = torch.tensor([tokenizer(text)["input_ids"]])

    def loss(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return found

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # A head of random weights is too flat to be sure of anything, so it is trained too.
    config = LoraConfig(r=16, target_modules=targets, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(quantized(base, "nf4"), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    model.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    deliver(origin(base, tmp_path / "adapter", "nf4"), Request("merged", tmp_path / "out"))
    with torch.no_grad():
        learnt, merged = loss(model.eval()).item(), loss(loaded(tmp_path / "out")).item()
        again = loss(quantized(tmp_path / "out", "nf4")).item()
    assert learnt < 1
    assert abs(merged / learnt - 1) < 0.01
    assert abs(again / learnt - 1) > 0.01


def test_the_verb_knows_how_the_run_held_its_base(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    base, run = folders["qwen2"], tmp_path / "run"
    make_adapter(base, lora(["q_proj"]), run / "final")
    config = {"model": {"name": "tiny:qwen2", "quantization": "nf4"}, "run": {"seed": 0}}
    (run / "config.json").write_text(json.dumps(config))
    assert cli.main(["export", "--run", str(run), "--to", "merged"]) == 0
    assert "| base model held in | nf4 |" in (run / "exports" / "merged" / "README.md").read_text()
    expected = logits(quantized(base, "nf4", run / "final"))
    assert (logits(loaded(run / "exports" / "merged")) - expected).abs().max() < 1e-4 * expected.std()

    assert capsys.readouterr().err == ""
