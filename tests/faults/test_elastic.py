"""Workers three, then two, then three: the same batches, the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from tests.helpers import Run, metrics, step_losses, write_jsonl

ROWS = [
    {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
    for i in range(60)
]
SETTINGS = (
    "model.name=tiny:qwen2",
    "data.seq_len=64",
    "data.eval.fraction=0",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.learning_rate=1e-4",
    "checkpoint.every_steps=10",
    "tracking.to=[]",
)


@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_cluster(run: Run, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    settings = (*SETTINGS, f"data.sources={rows}", "train.max_steps=400")
    elastic = ("scaling.num_workers=[1,3]", "scaling.resize_interval_s=2")
    command = [sys.executable, "-m", "tests.faults.elastic", str(tmp_path), *settings, *elastic]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(told) == {"status": "finished", "restarts": 2}
    sizes = [row["world_size"] for row in metrics(str(tmp_path / "elastic")) if "loss" in row]
    assert [size for size, _ in groupby(sizes)] == [3, 2, 3]
    fixed = run(*settings, "run.name=fixed", "scaling.num_workers=1")
    assert step_losses(str(tmp_path / "elastic")) == pytest.approx(step_losses(fixed.run), rel=1e-5)
    assert _batches(str(tmp_path / "elastic")) == _batches(fixed.run)


def _batches(run_dir: str) -> list[str]:
    return [row["batch"] for row in metrics(run_dir) if "loss" in row]
