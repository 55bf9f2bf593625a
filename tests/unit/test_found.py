"""What was found of a model is found again, and not of another one, nor with another adapter."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_ds import check as check_module
from raytune_ds import found, look
from raytune_ds.check import Checked, check, vary
from raytune_ds.compose import compose, replaced
from raytune_ds.errors import UserError
from raytune_ds.model import folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were looked at, one entry a look."""
    seen: list[str] = []
    real = look.look

    def counted(config: Any, model: Any, *rest: Any) -> found.Found:
        seen.append(model.name)
        return real(config, model, *rest)

    monkeypatch.setattr(look, "look", counted)
    return seen


def checked(storage: Path, model: Path | str, *overrides: str) -> Checked:
    return check(compose([], [f"run.storage={storage}", "tracking.to=[]", f"model.name={model}", *overrides]))


def test_a_model_is_looked_at_once(tmp_path: Path, tiny_models: dict[str, Path], looks: list[str]) -> None:
    first = checked(tmp_path, tiny_models["qwen2"], "adapter.r=4")
    again = checked(tmp_path, tiny_models["qwen2"], "adapter.r=4", "train.learning_rate=1e-5")
    assert looks == [str(tiny_models["qwen2"])]
    assert (again.report, again.base, again.config.adapter) == (
        first.report,
        first.base,
        first.config.adapter,
    )
    assert again.tokenizer == first.tokenizer
    assert again.tokenizer.traits == first.tokenizer.traits is not None
    moved = tmp_path / "moved"
    shutil.copytree(tiny_models["qwen2"], moved)
    assert checked(tmp_path, moved, "adapter.r=4").model.name == str(moved)
    assert len(looks) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.r=16"],
        ["adapter.kind=none"],
        ["model.dtype=float32"],
        ['model.add_special_tokens=["<t>"]'],
        ["data.chat_template=CHAT"],
    ],
)
def test_what_decides_makes_a_difference(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str], overrides: list[str]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    checked(tmp_path, tiny_models["deepseek-v3"])
    checked(tmp_path, tiny_models["deepseek-v3"], *(o.replace("CHAT", str(template)) for o in overrides))
    assert len(looks) == 2


@pytest.mark.parametrize(
    "changed", ["config.json", "tokenizer_config.json", "extra.py", "more/one.jinja", "model.safetensors"]
)
def test_another_file_in_the_folder_is_another_model(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str], changed: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2"], model)
    checked(tmp_path, model)
    path = model / changed
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    # Half of the weights, white space of what is text.
    half = len(content) // 2
    is_text = not changed.endswith("safetensors")
    path.write_bytes(content + b"\n" if is_text else content[:half] + bytes(len(content) - half))
    checked(tmp_path, model)
    assert len(looks) == 2


def test_what_is_too_large_to_read_is_told_by_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in another form may be; and runs may lie below the folder."""
    monkeypatch.setattr(folder, "_LARGE", 8)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    large, below = tmp_path / "model.gguf", tmp_path / "run" / "metrics.jsonl"
    for path in (large, below):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0123456789")
    before = folder.digest_beside_weights(tmp_path)
    below.write_bytes(b"another")
    assert folder.digest_beside_weights(tmp_path) == before
    os.utime(large, (1, 1))
    assert folder.digest_beside_weights(tmp_path) != before


def test_a_file_that_can_not_be_read_only_costs_the_look(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path) -> str:
        raise PermissionError("training_args.bin")

    monkeypatch.setattr(found, "digest_beside_weights", refused)
    for _ in range(2):
        checked(tmp_path, tiny_models["qwen2"])
    assert len(looks) == 2


def test_weights_that_can_not_be_read_are_named(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path) -> str:
        raise PermissionError(13, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr(check_module, "fingerprint", refused)
    with pytest.raises(UserError, match=r"Permission denied.*model\.safetensors"):
        checked(tmp_path, tiny_models["qwen2"])


def test_another_package_may_make_another_model(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(tmp_path, tiny_models["qwen2"])
    real = found.version
    monkeypatch.setattr(found, "version", lambda name: "0" if name == "bitsandbytes" else real(name))
    checked(tmp_path, tiny_models["qwen2"])
    assert len(looks) == 2


def test_trials_share_the_looks_and_the_commit_of_the_first(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str]
) -> None:
    """A trial may run where the hub's cache is older, or has something newer."""
    first = checked(tmp_path, tiny_models["qwen2"], "adapter.r=4")
    pinned = replace(first, base=replace(first.base, fingerprint="m@then", revision="then"))
    config = replaced(first.config, adapter={"r": 8})
    varied = vary(pinned, config)
    assert (varied.base.fingerprint, varied.base.revision) == ("m@then", "then")
    assert varied.base.trainable == 2 * first.base.trainable
    vary(first, config)
    before = len(looks)
    checked(tmp_path, tiny_models["qwen2"], "adapter.r=8")
    assert len(looks) == before, "the winner of a sweep was looked at as a trial"


def test_a_trial_with_another_adapter_is_looked_at(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str]
) -> None:
    first = checked(tmp_path, tiny_models["qwen2"], "adapter.r=4")
    config = compose([], [f"run.storage={tmp_path}", f"model.name={tiny_models['qwen2']}", "adapter.r=8"])
    varied = vary(first, config)
    assert varied.base.trainable == 2 * first.base.trainable
    assert varied.base.fingerprint == first.base.fingerprint
    assert len(looks) == 2


def test_what_is_kept_may_be_damaged_or_no_place_be_there(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checked(tmp_path, tiny_models["qwen2"])
    (kept,) = (tmp_path / found.FOLDER).iterdir()
    kept.write_text('{"adapter": {}}')
    assert checked(tmp_path, tiny_models["qwen2"]).report == first.report
    kept.unlink()

    real = found.storage.write_bytes

    def full(path: str, content: bytes) -> None:
        if found.FOLDER in path:
            raise OSError("No space left on device")
        real(path, content)

    monkeypatch.setattr(found.storage, "write_bytes", full)
    assert checked(tmp_path, tiny_models["qwen2"]).report == first.report
    assert len(looks) == 3


def test_a_model_that_can_not_be_trained_is_refused_each_time(
    tmp_path: Path, tiny_models: dict[str, Path], looks: list[str]
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="q_projj"):
            checked(tmp_path, tiny_models["qwen2"], 'adapter.targets=["q_projj"]')
    assert len(looks) == 2


def test_a_folder_without_a_config_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        checked(tmp_path, tmp_path / "empty")
