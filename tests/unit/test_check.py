"""What is said of an engine before anything starts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.check import check, vary
from raytune_ds.compose import compose
from raytune_ds.errors import UserError


def refusal(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(compose([], [f"run.storage={tmp_path}", "tracking.to=[]", *overrides]))
    return str(caught.value)


def test_deepspeed_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "deepspeed" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    message = refusal(tmp_path, "engine.kind=zero")
    assert "deepspeed is not installed; pip install deepspeed, or set engine.kind=fsdp" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,}', "is not JSON"),
        (json.dumps({"train_batch_size": 99}), "train_batch_size = 99 in"),
        (json.dumps({"zero_optimization": {"stage": 7}}), "stage = 7"),
    ],
)
def test_a_ds_config_that_can_not_be(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(content)
    assert message in refusal(tmp_path, f"engine.config={path}")


def test_the_base_model_is_known_by_its_weights(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """A copy elsewhere is the same base model; one with other weights under the same name is not."""
    import shutil

    def fingerprint(folder: Path) -> str:
        return check(
            compose([], [f"run.storage={tmp_path}", "tracking.to=[]", f"model.name={folder}"])
        ).base.fingerprint

    original, copied = tiny_models["qwen2"], tmp_path / "copied"
    shutil.copytree(original, copied)
    assert fingerprint(copied) == fingerprint(original)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(bytes(content))
    assert fingerprint(copied) != fingerprint(original)


def test_pretrain_wants_raw_text(tmp_path: Path) -> None:
    assert "set data.sources" in refusal(tmp_path, "objective.kind=pretrain")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    assert str(rows) in refusal(tmp_path, "objective.kind=pretrain", f"data.sources={rows}")


def test_judged_rows_can_be_looked_at_only(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    overrides = [f"data.sources={rows}", f"model.name={tiny_models['qwen2']}"]
    assert "No objective trains on such rows yet" in refusal(tmp_path, *overrides)
    config = compose([], [f"run.storage={tmp_path}", "tracking.to=[]", *overrides])
    looked_at = check(config, to_train=False)
    assert looked_at.inputs.items[0].format == "preference"
    with pytest.raises(UserError, match="No objective trains on such rows yet"):
        vary(looked_at, config)  # a trial trains
