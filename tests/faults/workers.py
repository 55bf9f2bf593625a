"""Does something to a worker of a run that is under way on our own Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psutil


def befall(run_dir: Path, num_lines: int, deed: Callable[[psutil.Process], None]) -> list[psutil.Process]:
    """Does `deed` to the youngest training worker once there are so many lines in the run's metrics.jsonl.

    Returns:
        At once; the list has that worker in it when it is done.
    """
    done: list[psutil.Process] = []
    file = run_dir / "metrics.jsonl"

    def wait() -> None:
        while not file.exists() or file.read_bytes().count(b"\n") < num_lines:
            threading.Event().wait(0.02)
        workers = [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]
        victim = max(workers, key=lambda p: p.create_time())
        deed(victim)
        done.append(victim)

    threading.Thread(target=wait, daemon=True).start()
    return done


def _is_worker(process: psutil.Process) -> bool:
    return any("RayTrainWorker" in part for part in process.cmdline())
