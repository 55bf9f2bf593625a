"""A run that was killed and went on with another number of workers is proved to have read each row once an epoch."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
from ray.train import TrainingFailedError

from raytune_ds import cli
from tests.faults.workers import befall
from tests.helpers import Run, metrics


@pytest.mark.slow
def test_a_run_that_was_killed_and_went_on_with_fewer_workers_is_proved(
    run: Run, settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also, its rows are told, and a row of metrics.jsonl that is taken away is missed."""
    settings = (*settings, "run.name=killed", "train.max_steps=40", "scaling.max_failures=0")
    killed = befall(tmp_path / "killed", 12, psutil.Process.kill)
    with pytest.raises(TrainingFailedError):
        run(*settings)
    assert killed
    result = run(*settings, "scaling.num_workers=1")
    sizes = [row["world_size"] for row in metrics(result.run) if "loss" in row]
    assert sizes.count(2) >= 7
    assert sizes.count(1) >= 10
    capsys.readouterr()
    assert cli.main(["verify", "--run", result.run]) == 0
    told = capsys.readouterr().out
    assert "step 40 of 40 on 2, then 1 worker(s)" in told
    assert "proved: every step once" in told

    assert cli.main(["data", "--run", result.run, "--step", "30"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0].endswith("; trained on")
    assert "rows.jsonl, row " in told
    assert ": say " in told

    other = Path(shutil.copytree(result.run, tmp_path / "other"))
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 30, "epoch"' not in line))
    assert cli.main(["verify", "--run", str(other)]) == 2
    assert "not in metrics.jsonl: steps 30\n" in capsys.readouterr().out
