"""Several adapters made one: what peft's arithmetic gives, as a plain peft directory, the base model not in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from raytune_ds import cli, combine
from tests.unit.test_merge import EXPERTS, loaded, logits, lora, make_adapter

FLOAT = torch.float32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["qwen2"], tmp_path / "base")


@pytest.fixture
def two(base: Path, tmp_path: Path) -> list[Path]:
    """Adapters of one rank on other layers, one of them with its own scale."""
    first = make_adapter(base, lora(["q_proj", "v_proj"]), tmp_path / "first")
    second = make_adapter(base, lora(["q_proj", "o_proj"], use_rslora=True), tmp_path / "second")
    return [first, second]


def export(folders: list[Path], target: Path, *words: str, to: str = "adapter") -> int:
    named = [str(folder) for folder in folders]
    return cli.main(["export", "--merge-adapters", *named, "--to", to, "--output", str(target), *words])


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, by peft."""
    model: Any = PeftModel.from_pretrained(loaded(base, FLOAT), str(adapter))
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_exact_combinations_add_up(base: Path, two: list[Path], tmp_path: Path, combination: str) -> None:
    assert export(two, tmp_path / "out", "--combination", combination, "--weights", "0.7", "-0.2") == 0
    found, (first, second) = deltas(base, tmp_path / "out"), (deltas(base, folder) for folder in two)
    assert found.keys() == first.keys() | second.keys()
    for name, delta in found.items():
        expected = 0.7 * first.get(name, torch.zeros(())) - 0.2 * second.get(name, torch.zeros(()))
        if (
            combination == "svd"
        ):  # of the rank of the adapters, so the nearest of that rank where they overlap
            u, s, v = torch.linalg.svd(expected, full_matrices=False)
            expected = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
        assert torch.allclose(delta, expected, atol=1e-5), name


@pytest.mark.parametrize("words", [
    ["linear"], ["ties", "--density", "0.5"], ["dare_linear", "--density", "0.7"], ["dare_ties", "--density", "0.7"],
    ["magnitude_prune", "--density", "0.5"], ["ties_svd", "--density", "0.5"],
], ids=lambda words: words[0])  # fmt: skip
def test_every_combination_equals_that_of_peft_on_the_whole_model(
    base: Path, two: list[Path], tmp_path: Path, words: list[str]
) -> None:
    assert export(two, tmp_path / "out", "--combination", *words, "--seed", "5") == 0
    model: Any = PeftModel.from_pretrained(loaded(base, FLOAT), str(two[0]), "a")
    model.load_adapter(str(two[1]), "b")
    torch.manual_seed(5)
    density = float(words[2]) if len(words) > 1 else None
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", words[0], density=density)
    model.set_adapter("sum")
    ours = PeftModel.from_pretrained(loaded(base, FLOAT), str(tmp_path / "out"))
    assert (logits(ours) - logits(model)).abs().max() < 1e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "combined" not in names
    assert f"| combination | {words[0]}" in (tmp_path / "out" / "README.md").read_text()


def test_a_combination_may_be_merged_at_once(base: Path, two: list[Path], tmp_path: Path) -> None:
    assert export(two, tmp_path / "adapter", "--combination", "cat", "--weights", "1", "0.5") == 0
    assert export(two, tmp_path / "merged", "--combination", "cat", "--weights", "1", "0.5", to="merged") == 0
    expected = logits(PeftModel.from_pretrained(loaded(base, FLOAT), str(tmp_path / "adapter")))
    assert (logits(loaded(tmp_path / "merged")) - expected).abs().max() < 1e-5


def test_a_run_stands_for_its_adapter(base: Path, two: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "run" / "final")
    assert export([tmp_path / "run", two[1]], tmp_path / "out", "--combination", "cat") == 0
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 24


def test_adapters_of_other_bases_are_not_combined(
    two: list[Path], folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    other = make_adapter(folders["llama"], lora(["q_proj"]), tmp_path / "other")
    assert export([two[0], other], tmp_path / "out") == 2
    assert "of different base models" in (said := capsys.readouterr().err)
    assert str(folders["llama"]) in said
    assert not (tmp_path / "out").exists()


def refused(base: Path, tmp_path: Path, config: Any, capsys: Any, *words: str) -> str:
    plain = make_adapter(base, lora(["q_proj"]), tmp_path / "plain")
    odd = make_adapter(base, config, tmp_path / "odd")
    assert export([plain, odd], tmp_path / "out", *words) == 2
    assert not (tmp_path / "out").exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("config", "message"), [
    (peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"), "all need one rank, and these have 4, 8"),
    (lora(["q_proj"], use_dora=True), "no way to combine DoRA"),
    (lora(["q_proj"], modules_to_save=["lm_head"]), "whole modules"),
    (lora(["q_proj"], trainable_token_indices=[5]), "trained tokens"),
    (lora(["q_proj"], bias="all"), "trained biases"),
    (peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "of type LOHA"),
], ids=range(6))  # fmt: skip
def test_what_can_not_be_combined(base: Path, tmp_path: Path, config: Any, message: str, capsys: Any) -> None:
    assert message in refused(base, tmp_path, config, capsys)


def test_experts_can_not_be_combined(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    config = lora(["o_proj"], target_parameters=EXPERTS)
    base = folders["deepseek-v3"]
    pair = [make_adapter(base, lora(["o_proj"]), tmp_path / "a"), make_adapter(base, config, tmp_path / "b")]
    assert export(pair, tmp_path / "out") == 2
    assert "target_parameters" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--weights", "1"], "1 numbers for 2 adapters"),
    (["--combination", "ties"], "needs --density"),
    (["--combination", "ties", "--density", "1.5"], "above 0 and at most 1"),
    (["--density", "0.5"], "keeps all values"),
    (["--weights", "0", "0"], "leaves nothing of the adapters"),
], ids=range(5))  # fmt: skip
def test_mistakes_are_named(
    two: list[Path], tmp_path: Path, words: list[str], message: str, capsys: Any
) -> None:
    assert export(two, tmp_path / "out", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_combinations_are_those_of_peft() -> None:
    """Should peft learn another one, this fails and the list grows."""
    import inspect
    from typing import get_args, get_type_hints

    hints = get_type_hints(peft.tuners.lora.LoraModel.add_weighted_adapter)
    assert set(get_args(hints["combination_type"])) == set(combine.COMBINATIONS), inspect.getfile(peft)


def test_an_adapter_without_its_config(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    (two[1] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"})[:-1])
    assert export(two, tmp_path / "out") == 2
    assert "is no adapter that peft saved" in capsys.readouterr().err
