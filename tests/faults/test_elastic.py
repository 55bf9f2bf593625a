"""Nodes that come and go: the same batches, the same losses, and no step lost of which there was notice."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import ROWS
from tests.helpers import Run, metrics, step_losses, write_jsonl

pytestmark = pytest.mark.slow
SETTINGS = (
    "model.name=tiny:qwen2",
    "data.seq_len=64",
    "data.eval.fraction=0",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.learning_rate=1e-4",
    "train.max_steps=400",
    "tracking.to=[]",
)


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return (*SETTINGS, f"data.sources={rows}")


def told(story: str, run: Path, *settings: str) -> dict[str, Any]:
    """The result of a run of a story."""
    command = [sys.executable, "-m", "tests.faults.elastic", story, str(run), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(json.loads((run / "result.json").read_text()))


def batches(run: Path | str) -> list[str]:
    return [row["batch"] for row in metrics(str(run)) if "loss" in row]


def test_a_run_shrinks_and_grows_with_its_cluster(
    run: Run, settings: tuple[str, ...], tmp_path: Path
) -> None:
    """Three workers, then two, then three."""
    elastic = ("scaling.num_workers=[1,3]", "scaling.resize_interval_s=2", "checkpoint.every_steps=10")
    result = told("resize", tmp_path / "elastic", *settings, *elastic)
    sizes = [row["world_size"] for row in metrics(str(tmp_path / "elastic")) if "loss" in row]
    assert [size for size, _ in groupby(sizes)] == [3, 2, 3]
    lost, grown = result["restarts"]
    assert (lost["num_workers"], grown["num_workers"]) == (2, 3)
    assert grown["why"] == "the number of workers changes to 3"
    fixed = run(*settings, "run.name=fixed", "scaling.num_workers=2")
    assert batches(tmp_path / "elastic") == batches(fixed.run)
    assert step_losses(str(tmp_path / "elastic")) == pytest.approx(step_losses(fixed.run), rel=1e-5)


def test_a_node_that_gives_notice_costs_no_checkpoint_interval(
    run: Run, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only checkpoints before the end are those of the notice, and no failure is allowed but preemptions."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    rare = (
        "scaling.num_workers=2",
        "checkpoint.every_steps=100000",
        "scaling.max_failures=0",
        "train.max_steps=700",
    )
    result = told("preempt", tmp_path / "spot", *settings, *rare)
    [restart] = result["restarts"]
    assert "preemption" in restart["why"]
    assert restart["from_step"] >= 25
    assert restart["lost_steps"] < 150  # of the last seconds, and not of the half minute since the notice
    fixed = run(*settings, "run.name=fixed", "scaling.num_workers=2", "train.max_steps=700")
    assert step_losses(str(tmp_path / "spot")) == step_losses(fixed.run)
