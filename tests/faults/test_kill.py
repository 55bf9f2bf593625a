"""What is killed goes on: the same steps, the same losses, each step once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from tests.helpers import Run, step_losses, write_jsonl

ROWS = [
    {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
    for i in range(60)
]
SETTINGS = (
    "data.seq_len=64",
    "data.eval.fraction=0",
    "scaling.num_workers=2",
    "train.global_batch=3",
    "train.max_steps=60",
    "train.learning_rate=1e-3",
    "checkpoint.every_steps=7",
)


def _kill_a_worker_after(run_dir: Path, num_lines: int, killed: list[int]) -> None:
    """Waits for so many lines in the run's metrics.jsonl, then kills the youngest training worker of our own Ray."""
    file = run_dir / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < num_lines:
        threading.Event().wait(0.02)
    workers = [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]
    victim = max(workers, key=lambda p: p.create_time())
    os.kill(victim.pid, signal.SIGKILL)
    killed.append(victim.pid)


def _is_worker(process: psutil.Process) -> bool:
    return any("RayTrainWorker" in part for part in process.cmdline())


def test_a_killed_worker_costs_only_time(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill -9 of a rank in mid-run: to the bit the losses of an undisturbed run."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    calm = run(f"data.sources={data}", "run.name=calm", *SETTINGS)
    killed: list[int] = []
    killer = threading.Thread(
        target=_kill_a_worker_after, args=(tmp_path / "killed", 20, killed), daemon=True
    )
    killer.start()
    result = run(f"data.sources={data}", "run.name=killed", *SETTINGS)
    assert killed, "the run ended before anything was killed"
    assert len(result.restarts) == 1
    assert step_losses(result.run) == step_losses(calm.run)
    assert "resuming from the checkpoint of step" in capsys.readouterr().out
