"""What a worker refuses before it trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ds import worker
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.assignment import differences, harmless_changes, require_same_run, told_of
from raytune_ds.catalog import Manifest
from raytune_ds.compose import compose
from raytune_ds.errors import UserError
from raytune_ds.rundir import RunDir

IDENTITY = {"run.seed": 0, "model.weights": "0123", "train": {"learning_rate": 1e-4, "global_batch": 8}}


def refusal(before: dict[str, Any] | None = None, overrides: tuple[str, ...] = (), **changes: Any) -> str:
    """What is said of a run that goes on with these changes."""
    assignment: Any = SimpleNamespace(
        run=RunDir("/runs/one"), identity=IDENTITY | changes, config=compose([], overrides)
    )
    with pytest.raises(UserError) as caught:
        require_same_run(assignment, Manifest(1, 1, IDENTITY, {}, None, {}, ()), before)
    return str(caught.value)


def test_each_difference_is_named() -> None:
    message = refusal(train={"learning_rate": 1e-3, "global_batch": 4}, **{"run.seed": 1})
    assert "run.name = one" in message
    for line in (
        "run.seed: 0 then, 1 now",
        "train.learning_rate: 0.0001 then, 0.001 now",
        "global_batch: 8 then, 4",
    ):
        assert line in message
    assert "base model" not in message


def test_a_base_model_that_has_changed_is_named() -> None:
    message = refusal(**{"model.weights": "4567"})
    assert "model.weights: 0123 then, 4567 now" in message
    assert "the files of the base model have changed" in message


def test_of_other_data_the_keys_are_named_that_made_it() -> None:
    before = compose([], []).model_dump(mode="json")
    message = refusal(before, ("data.seq_len=128",), data="4567")
    assert "data.seq_len: 2048 then, 128 now" in message
    assert "the files of data.sources have other rows" in refusal(before, data="4567")
    assert "the files of data.sources have other rows" in refusal(None, ("data.seq_len=128",), data="4567")


def test_settings_that_change_nothing_are_listed() -> None:
    before = compose([], ["run.name=one"]).model_dump(mode="json")
    overrides = ["run.name=two", "train.num_train_epochs=5", "engine.kind=fsdp"]
    assignment: Any = SimpleNamespace(config=compose([], overrides))
    assert harmless_changes(assignment, before) == [
        "train.num_train_epochs: 3.0 -> 5.0",
        "engine.kind: auto -> fsdp",
    ]
    assert harmless_changes(SimpleNamespace(config=compose([], [])), before) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("there", [False, True])
def test_a_model_that_is_not_the_same_on_this_node(
    tmp_path: Path, tiny_models: dict[str, Path], there: bool
) -> None:
    """Other files, or none: the usual mistake, a path that is only good on the node that the run was started from."""
    folder = tiny_models["qwen2"] if there else tmp_path / "missing"
    assignment: Any = SimpleNamespace(
        config=None,
        base=SimpleNamespace(revision=None, fingerprint="0123"),
        model=SimpleNamespace(name=str(folder)),
    )
    with pytest.raises(UserError, match="Use a path that all nodes share"):
        worker._build(assignment, None, None, None, None)  # type: ignore[arg-type]


def test_checkpoints_of_before_there_were_more_kinds_of_adapters_are_gone_on_from() -> None:
    before = {"kind": "lora", "r": 8, "alpha": 16.0, "dropout": 0.0, "bias": "none", "targets": "auto"}
    assert told_of(AdapterConfig()) == before
    assert list(differences({"adapter": before}, {"adapter": told_of(AdapterConfig(use_dora=True))})) == [
        ("adapter.use_dora", None, True)
    ]
    dora = told_of(AdapterConfig(use_dora=True, rank_pattern={"o_proj": 4}))
    assert {key for key, *_ in differences(dora, before)} == {"use_dora", "rank_pattern"}
