"""One real local Ray for the whole session, and runs on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

NUM_CPUS = 4  # logical: three workers fit, whatever the machine has


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once: a start costs seconds, and its worker processes stay warm between tests."""
    import ray

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


Run = Callable[..., Any]


@pytest.fixture()
def run(ray_session: None, tmp_path: Path) -> Run:
    """Launches a run from overrides, with its storage in the test's own folder; returns the Result."""
    from raytune_ds.compose import compose
    from raytune_ds.launch import launch

    def start(*overrides: str, storage: Path = tmp_path) -> Any:
        return launch(compose([], [f"run.storage={storage}", "tracking.to=[]", *overrides]))

    return start


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics(run_dir: str) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def step_losses(run_dir: str) -> list[float]:
    """The loss of each optimizer step, each step once and in order."""
    rows = [row for row in metrics(run_dir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
