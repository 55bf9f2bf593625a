"""Processes that wait for a run become its workers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from raytune_ds import cluster, early
from raytune_ds.compose import compose
from tests.helpers import Run

DEADLINE_S = 60


def waiting() -> list[int]:
    """Processes that would be workers, and are nobody's yet."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if "ray::IDLE" in (process.info["cmdline"] or ()) and "raytune_ds.early" in process.environ().get(
                WORKER_PROCESS_SETUP_HOOK_ENV_VAR, ""
            ):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_worker_is_a_process_that_waited(run: Run) -> None:
    """Ray Train takes it, for it is in all respects like the one it would start; nobody else would end it so soon."""
    settings = ("train.max_steps=1", "train.global_batch=4", "data.seq_len=256", "scaling.num_workers=1")
    config = compose([], [*settings])
    before = set(waiting())
    early.start(config, cluster.plan_scale(config.scaling, config.train.global_batch))
    end = time.monotonic() + DEADLINE_S
    while not (there := set(waiting()) - before) and time.monotonic() < end:
        time.sleep(0.1)  # between two looks, not in place of one
    assert len(there) == 1
    (pid,) = there
    if sys.platform == "linux":
        assert str(early.JEMALLOC) in Path(f"/proc/{pid}/maps").read_text()
    result = run("run.name=early", *settings)
    phases = list(result.startup_s.values())
    assert phases == sorted(phases)
    assert "first step done" in result.startup_s
    end = time.monotonic() + early.KEPT_S / 4
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.1)  # as above
    assert not psutil.pid_exists(pid)
