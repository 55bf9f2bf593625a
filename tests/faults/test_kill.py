"""What is killed goes on: the same steps, the same losses, each step once."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from tests.helpers import Run, step_losses


def workers_after(run_dir: Path, num_lines: int) -> list[psutil.Process]:
    """The training workers of our own Ray, once there are so many lines in the run's metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < num_lines:
        threading.Event().wait(0.02)
    return [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]


def _is_worker(process: psutil.Process) -> bool:
    return any("RayTrainWorker" in part for part in process.cmdline())


def test_a_killed_worker_costs_only_time(
    run: Run,
    settings: tuple[str, ...],
    calm_losses: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kill -9 of a rank in mid-run: to the bit the losses of an undisturbed run."""
    killed: list[psutil.Process] = []

    def kill() -> None:
        killed.append(max(workers_after(tmp_path / "killed", 20), key=lambda p: p.create_time()))
        killed[0].kill()

    threading.Thread(target=kill, daemon=True).start()
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
