"""A sample of `python -m tests.matrix.adapters`: trained, resumed, and loaded by those who know nothing of us."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raytune_ds.check import check
from raytune_ds.compose import compose
from raytune_ds.errors import UserError
from raytune_ds.model.initial import Initial
from tests.alone import assignment, prepared, work
from tests.matrix.adapters import BASE, QUANTIZED, VARIANTS, Trial, trial

SAMPLE = [
    ("lora+", "qwen2", VARIANTS["lora+"]),
    ("dora", "qwen2", VARIANTS["dora"]),
    ("pissa+rslora", "qwen2", VARIANTS["pissa+rslora"]),
    ("eva", "qwen2", VARIANTS["eva"]),
    ("adalora", "qwen2", VARIANTS["adalora"]),
    ("vblora", "qwen2", VARIANTS["vblora"]),
    ("all", "deepseek-v3", BASE | {"targets": "all"}),
    ("experts and router", "deepseek-v2", BASE | {"targets": ["experts", "router"]}),
    ("sparse attention", "deepseek-v3.2", BASE | {"targets": "attention", "modules_to_save": ["lm_head"]}),
    ("compressed attention", "deepseek-v4", BASE | {"targets": "all"}),
    *((name, *QUANTIZED[name]) for name in ("nf4 loftq", "nf4 experts")),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "architecture", "adapter"), SAMPLE, ids=[s[0] for s in SAMPLE])
def test_it_learns_resumes_and_is_loaded(
    tiny_models: dict[str, Path], tmp_path: Path, name: str, architecture: str, adapter: dict[str, Any]
) -> None:
    bits = "nf4" if name in QUANTIZED else "none"
    assert trial(prepared(tmp_path), tiny_models[architecture], tmp_path, adapter, bits).problems() == []


def test_loftq_begins_nearer_to_what_was_quantized(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    def first_loss(bits: str, begins: str) -> float:
        adapter = BASE | {"init_lora_weights": begins}
        how = {"quantization": bits}
        return losses(
            run(tmp_path, tiny_models["qwen2"], f"{bits}-{begins}", adapter, of_model=how, max_steps=1)
        )[0]

    plain = first_loss("none", "default")
    assert abs(first_loss("nf4", "loftq") - plain) < abs(first_loss("nf4", "default") - plain)


def test_a_trial_that_went_wrong_says_so() -> None:
    losses = tuple(6.0 - 0.1 * step for step in range(20))
    good = Trial(losses, losses[8:], losses[-1], losses[-1], 1, 0.1)
    assert good.problems() == []
    wrong = Trial(losses[::-1], losses[8:], 5.0, 5.1, 1, 0.1).problems()
    assert [problem.split()[0] for problem in wrong] == ["the", "other", "loaded", "merged"]


# ---- beginnings -----------------------------------------------------------------------------------


def run(tmp_path: Path, model: Path, name: str, adapter: dict[str, Any], **more: Any) -> Any:
    store = tmp_path / ".prepared"
    given = assignment(
        prepared(tmp_path) if not store.exists() else stored(tmp_path),
        model,
        str(tmp_path),
        name,
        adapter,
        **more,
    )
    outcome = work(given, lambda kind, content: None)
    if outcome.error:
        raise UserError(outcome.error)
    return given


def stored(tmp_path: Path) -> Any:
    from raytune_ds.data.store import Manifest, Store

    folder = tmp_path / ".prepared" / "0123"
    return Store(str(folder), Manifest.from_json((folder / "manifest.json").read_text()))


def losses(given: Any) -> list[float]:
    return [row["loss"] for row in given.run.read_metrics() if "loss" in row]


def test_training_goes_on_from_an_adapter(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first = run(tmp_path, tiny_models["qwen2"], "first", {"r": 4, "targets": "attention"})
    then = run(tmp_path, tiny_models["qwen2"], "then", {"path": first.run.final})
    assert losses(then)[0] < 0.97 * losses(first)[0]
    saved = json.loads(Path(then.run.final, "adapter_config.json").read_text())
    assert (saved["r"], sorted(saved["target_modules"])) == (4, ["k_proj", "o_proj", "q_proj", "v_proj"])
    # It is the run's own from then on: the first one may go.
    begun, end = Initial.read(then.run.initial), load_file(Path(first.run.final, "adapter_model.safetensors"))
    assert all(torch.equal(begun.tensors[name], tensor) for name, tensor in end.items())


def test_an_adapter_of_another_model_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first = run(tmp_path, tiny_models["deepseek-v3"], "first", {"r": 4}, max_steps=1)
    with pytest.raises(UserError, match=r"another base model|peft refuses"):
        run(tmp_path, tiny_models["llama"], "then", {"path": first.run.final}, max_steps=1)
    with pytest.raises(UserError, match="is no peft adapter"):
        run(tmp_path, tiny_models["llama"], "none", {"path": str(tmp_path / "nowhere")}, max_steps=1)


def test_dora_on_a_quantized_base_begins_where_that_is(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Its magnitudes are those of the weights that it sees, and of what LoftQ has added to them."""

    def first_loss(**adapter: Any) -> float:
        name = "-".join(adapter)
        how = {"quantization": "nf4"}
        return losses(
            run(tmp_path, tiny_models["qwen2"], f"run{name}", BASE | adapter, of_model=how, max_steps=1)
        )[0]

    assert first_loss(use_dora=True) == pytest.approx(first_loss(), rel=1e-6)
    loftq = first_loss(init_lora_weights="loftq")
    assert first_loss(init_lora_weights="loftq", use_dora=True) == pytest.approx(loftq, rel=1e-6)


def test_a_beginning_that_was_made_for_other_settings_is_made_anew(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A run that died before its first checkpoint may be started again with others."""
    pissa = BASE | {"init_lora_weights": "pissa"}
    first = run(tmp_path, tiny_models["qwen2"], "run", pissa, max_steps=1)
    shutil.rmtree(first.run.checkpoints)
    shutil.rmtree(first.run.final)
    again = run(tmp_path, tiny_models["qwen2"], "run", pissa | {"r": 2}, max_steps=1)
    assert Initial.read(again.run.initial).config.r == 2
    assert json.loads(Path(again.run.final, "adapter_config.json").read_text())["r"] == 4


def test_a_run_goes_on_from_its_own_copy_of_an_adapter(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first = run(tmp_path, tiny_models["qwen2"], "first", {"r": 4}, max_steps=1)
    moved = tmp_path / "moved"
    Path(first.run.final).rename(moved)
    words = [f"model.name={tiny_models['qwen2']}", f"run.storage={tmp_path}", "run.name=then"]
    checked = check(compose([], [*words, f"adapter.path={moved}"]))
    assert checked.config.adapter.path == str(moved)
    assert {group.ranks for group in checked.report.adapted} == {(4,) * 4}
    run(tmp_path, tiny_models["qwen2"], "then", {"path": str(moved)}, max_steps=1)
    shutil.rmtree(moved)
    assert check(compose([], [*words, f"adapter.path={moved}"])).report == checked.report
    with pytest.raises(UserError, match="is no peft adapter"):
        check(compose([], [*words, f"adapter.path={moved}", "run.name=another"]))


def peft_directory(tmp_path: Path, model: Path, config: Any) -> str:
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path / "peft")
    return str(tmp_path / "peft")


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            (),
            "does not wrap layers in place",
        ),
        (
            LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
            (),
            "relative to a base model of its own",
        ),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), (), "adapts the output head"),
        (LoraConfig(target_modules=["q_proj"]), ("model.add_tokens=[<dose>]",), "begin a new adapter"),
        (LoraConfig(target_modules=["q_proj"]), ("adapter.r=4",), "adapter.r = 4 .*leave it out"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=9), (), "plans by the length of its run"),
    ],
)
def test_adapters_that_can_not_be_gone_on_from(
    tiny_models: dict[str, Path], tmp_path: Path, config: Any, more: tuple[str, ...], message: str
) -> None:
    path = peft_directory(tmp_path, tiny_models["llama"], config)
    words = [f"model.name={tiny_models['llama']}", f"run.storage={tmp_path}", f"adapter.path={path}", *more]
    with pytest.raises(UserError, match=message):
        check(compose([], words))


def test_pissa_begins_where_the_base_model_is(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """What was taken out of the weights is what the adapter adds to them."""
    model = tiny_models["qwen2"]
    plain = run(tmp_path, model, "plain", BASE, max_steps=1)
    begun = run(tmp_path, model, "pissa", BASE | {"init_lora_weights": "pissa"}, max_steps=1)
    assert losses(begun) == pytest.approx(losses(plain), rel=1e-5)
    saved = json.loads(Path(begun.run.final, "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (8, 16.0, True)
    assert any(
        tensor.any() for name, tensor in Initial.read(begun.run.initial).tensors.items() if "lora_B" in name
    )


_ELSEWHERE = """
import sys, torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
assert "raytune_ds" not in sys.modules
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
ids = torch.arange(5, 45)[None]
with torch.no_grad():
    adapted = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
torch.save((adapted, merged), sys.argv[3])
"""


def test_another_process_loads_what_was_trained(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_models["deepseek-v3"]
    given = run(tmp_path, model, "run", BASE | {"targets": "all"}, max_steps=4)
    words = [str(model), given.run.final, str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    adapted, merged = torch.load(tmp_path / "logits.pt", weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        here = PeftModel.from_pretrained(base, given.run.final).eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, here, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, here, rtol=0, atol=1e-4)


def test_lora_plus_moves_b_faster_and_a_as_before(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """AdamW's first step is as long as the learning rate, whatever the gradient."""

    def tensors(name: str, **more: Any) -> dict[str, torch.Tensor]:
        how = {"max_steps": 1, "lr_scheduler_type": "constant"}
        given = run(tmp_path, tiny_models["qwen2"], name, BASE | more, **how)
        return load_file(Path(given.run.final, "adapter_model.safetensors"))

    plain, plus = tensors("plain"), tensors("plus", loraplus_lr_ratio=4.0)
    for name, tensor in plain.items():
        factor = 4.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(plus[name], factor * tensor, rtol=1e-4, atol=1e-6)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_B" in name)
