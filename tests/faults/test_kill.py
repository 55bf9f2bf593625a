"""What is killed goes on: the same steps, the same losses, each step once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.faults.workers import befall
from tests.helpers import Run, step_losses


def test_a_killed_worker_costs_only_time(
    run: Run,
    settings: tuple[str, ...],
    calm_losses: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kill -9 of a rank in mid-run: to the bit the losses of an undisturbed run."""
    killed = befall(tmp_path / "killed", 20, psutil.Process.kill)
    result = run("run.name=killed", *settings)
    assert killed, "the run ended before anything was killed"
    assert len(result.restarts) == 1
    restart = result.restarts[0]
    assert 0 <= restart["last_step"] - restart["from_step"] < 14  # a checkpoint may be in flight
    assert all(
        restart[part] is not None for part in ("noticing_s", "starting_s", "loading_s", "first_step_s")
    )
    assert step_losses(result.run) == calm_losses
    assert "resuming from the checkpoint of step" in capsys.readouterr().out
