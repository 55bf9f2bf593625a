"""What the tests of faults share: a run that nothing befalls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import step_losses, write_jsonl

ROWS = [
    {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
    for i in range(60)
]
SETTINGS = (
    "data.seq_len=64",
    "data.eval.fraction=0",
    "scaling.num_workers=2",
    "train.global_batch=3",
    "train.max_steps=160",
    "train.learning_rate=1e-3",
    "checkpoint.every_steps=7",
    "tracking.to=[]",
)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Of a run that takes some seconds once its workers are there, with its data."""
    rows = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)
    return (f"data.sources={rows}", *SETTINGS)


@pytest.fixture(scope="session")
def calm_losses(
    ray_session: None, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Of that run, undisturbed."""
    from raytune_ds.compose import compose
    from raytune_ds.launch import launch

    storage: Path = tmp_path_factory.mktemp("calm")
    return step_losses(launch(compose([], [f"run.storage={storage}", "run.name=calm", *settings])).run)
