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

from raytune_ds import cli, combine, origin
from raytune_ds.catalog import Manifest, directory, write_manifest
from raytune_ds.config import ModelConfig
from raytune_ds.model.folder import fingerprint
from raytune_ds.model.load import load_for_generation
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


def test_an_adapter_is_made_unless_something_else_is_said(two: list[Path], tmp_path: Path) -> None:
    words = [*("--combination", "ties"), *("--weights", "0.5", "0.5"), *("--density", "0.5")]
    folders = [str(folder) for folder in two]
    assert cli.main(["export", "--merge-adapters", *folders, *words, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()


# ---- how the adapters were trained ----------------------------------------------------------------


def run_of(adapter: Path, folder: Path, weights: str = "", **model: Any) -> Path:
    """A run directory with that adapter, and a checkpoint that says what its base model was."""
    shutil.copytree(adapter, folder / "final")
    (folder / "config.json").write_text(json.dumps({"model": {"name": "tiny:qwen2", **model}}))
    if weights:
        manifest = Manifest(1, 1, {"model.weights": weights}, {}, None, {}, ())
        write_manifest(directory(f"{folder}/checkpoints", 1), manifest)
    return folder


def test_quantised_adapters_are_merged_into_what_they_saw(
    base: Path, two: list[Path], tmp_path: Path, capsys: Any
) -> None:
    first = run_of(two[0], tmp_path / "a", quantization="nf4")
    second = run_of(two[1], tmp_path / "b", quantization="nf4")
    words = ("--combination", "cat", "--weights", "1", "0.5")
    assert export([first, second / "final"], tmp_path / "adapter", *words) == 0
    assert "for the base model held in nf4" in " ".join(capsys.readouterr().out.split())
    assert "| base model held in | nf4 |" in (tmp_path / "adapter" / "README.md").read_text()
    assert export([first, second / "final"], tmp_path / "merged", *words, to="merged") == 0
    model = ModelConfig(name=str(base), quantization="nf4")
    held = load_for_generation(model, FLOAT, torch.device("cpu"), tmp_path / "adapter")
    expected = logits(held)
    found = logits(loaded(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    other = logits(PeftModel.from_pretrained(loaded(base, FLOAT), str(tmp_path / "adapter")))
    assert (other - expected).abs().max() > 1e-3 * expected.std(), "not the base model that was quantised"


@pytest.mark.parametrize("other", [{}, {"quantization": "int8"}, None])
def test_adapters_of_bases_held_in_several_ways_are_not_combined(
    two: list[Path], tmp_path: Path, other: dict[str, Any] | None, capsys: Any
) -> None:
    """A folder that was taken out of its run is of nobody knows what."""
    first = run_of(two[0], tmp_path / "a", quantization="nf4")
    second = two[1] if other is None else run_of(two[1], tmp_path / "b", **other)
    assert export([first, second], tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{first}: nf4" in said
    assert f"{second}: {'int8' if other else 'full precision'}" in said
    assert not (tmp_path / "out").exists()


def test_the_base_model_has_to_be_what_it_was(
    base: Path, two: list[Path], tmp_path: Path, capsys: Any
) -> None:
    now = fingerprint(base)
    first, second = run_of(two[0], tmp_path / "a", now), run_of(two[1], tmp_path / "b", "other")
    assert export([first, second], tmp_path / "out") == 2
    assert "trained on base models with the fingerprints" in " ".join(capsys.readouterr().err.split())
    third = run_of(two[1], tmp_path / "c", now)
    assert export([first, third], tmp_path / "out", "--combination", "cat") == 0
    assert f"| base model's fingerprint | {now} |" in (tmp_path / "out" / "README.md").read_text()
    values = json.loads((base / "config.json").read_text()) | {"changed": True}
    (base / "config.json").write_text(json.dumps(values))
    assert export([first, two[1]], tmp_path / "again", "--combination", "cat") == 2
    assert "is not the base model that the adapter was trained on" in " ".join(
        capsys.readouterr().err.split()
    )


def test_code_is_trusted_and_commits_are_kept_as_the_runs_did(two: list[Path], tmp_path: Path) -> None:
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text()) | {
            "base_model_name_or_path": "org/base"
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
    first = run_of(two[0], tmp_path / "a", "org/base@c0ffee")
    second = run_of(two[1], tmp_path / "b", trust_remote_code=True)
    places = [f"{folder}/final" for folder in (first, second)]
    base, revision, _ = origin._shared(places, places, "org/base")
    assert (base.name, base.trust_remote_code, revision) == ("org/base", True, "c0ffee")


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
