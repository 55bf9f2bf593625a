"""Whole runs on Ray with sharding engines: what they save is what they trained, and another engine goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.data.store import Store
from tests.helpers import Run, step_losses

SETTINGS = (
    "data.seq_len=128",
    "data.eval.fraction=0.05",
    "train.global_batch=5",
    "train.learning_rate=1e-3",
    "train.max_steps=6",
    "scaling.num_workers=2",
)
FULL = "adapter.kind=none"


def held_out_loss(run: str, storage: Path) -> float:
    """Plain transformers (and peft) on `final/`, a document a forward pass."""
    import torch
    import torch.nn.functional as F
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    final = Path(run) / "final"
    model: Any
    if (final / "adapter_config.json").exists():
        base = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final)
    else:
        model = AutoModelForCausalLM.from_pretrained(final)
    (folder,) = (storage / ".prepared").iterdir()
    store = Store.find(str(folder))
    assert store is not None
    order, reader = store.order("eval", 16, seed=None), store.reader("eval")
    loss = weight = 0.0
    for step in range(order.steps_per_epoch):
        for pack in reader.step(order, step, range(16)):
            start = 0
            for length in pack["lengths"].tolist():
                span = slice(start, start + length)
                start += length
                ids, targets, weights = (torch.tensor(pack[n][span]) for n in ("ids", "targets", "weights"))
                with torch.no_grad():
                    logits = model(input_ids=ids.long()[None]).logits[0].float()
                nll = F.cross_entropy(logits, targets.long(), reduction="none")
                loss += float((nll * weights).sum())
                weight += float(weights.sum())
    return loss / weight


def hold(run: Any, storage: Path) -> None:
    """What the run saved has the loss that the run measured, and nothing of its beginning is left."""
    measured, before = run.progress["last_eval_loss"], run.progress["first_eval_loss"]
    assert measured < before - 1e-3
    assert held_out_loss(run.run, storage) == pytest.approx(measured, rel=1e-5)
    assert not (Path(run.run) / "checkpoints" / "rehearsal").exists()
    if run.engine == "zero":
        assert "train_micro_batch_size_per_gpu" in (Path(run.run) / "ds_config.json").read_text()


def test_an_adapter_of_a_model_of_the_hub(
    run: Run, tmp_path: Path, hub_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained in shards; the model is in its cache, as on a machine without a network."""
    result = run(
        *SETTINGS, "engine.kind=zero", "engine.stage=3", "adapter.kind=lora", f"model.name={hub_model}"
    )
    assert result.status == "finished"
    assert "org/tiny is fetched to each node" in capsys.readouterr().out
    assert "org/tiny" in (Path(result.run) / "final" / "README.md").read_text()
    hold(result, tmp_path)


def test_another_engine_on_more_workers_goes_on_with_the_same_losses(run: Run, tmp_path: Path) -> None:
    """Of all parameters: with ZeRO-2, and with ZeRO-3 and then FSDP, whose second half is another launch."""
    schedule = ("train.lr_scheduler_type=constant", "train.warmup_ratio=0", FULL)
    whole = run(*SETTINGS, *schedule, "run.name=whole", "engine.kind=zero", "engine.stage=2")
    hold(whole, tmp_path)
    run(*SETTINGS, *schedule, "run.name=cut", "train.max_steps=3", "engine.kind=zero", "engine.stage=3")
    cut = run(*SETTINGS, *schedule, "run.name=cut", "engine.kind=fsdp", "scaling.num_workers=3")
    assert cut.engine == "fsdp"
    assert step_losses(cut.run) == pytest.approx(step_losses(whole.run), rel=1e-5)
    hold(cut, tmp_path)
