"""What a worker refuses before it trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ds import worker
from raytune_ds.assignment import require_same_run
from raytune_ds.checkpoint import Manifest
from raytune_ds.errors import UserError
from raytune_ds.rundir import RunDir

IDENTITY = {"run.seed": 0, "model.weights": "0123", "train": {"learning_rate": 1e-4, "global_batch": 8}}


def refusal(**changes: Any) -> str:
    """What is said of a run that goes on with these changes."""
    assignment: Any = SimpleNamespace(run=RunDir("/runs/one"), identity=IDENTITY | changes)
    with pytest.raises(UserError) as caught:
        require_same_run(assignment, Manifest(1, 1, IDENTITY, {}, None, {}, ()))
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
        worker._build(assignment, None, None, None)  # type: ignore[arg-type]
