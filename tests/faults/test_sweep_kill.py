"""A sweep whose driver is killed goes on with the same command, and comes to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raytune_ds.sweep.journal import Journal
from tests.head import environment_with
from tests.helpers import write_jsonl
from tests.integration.test_sweep import ROWS, SETTINGS, leaderboard, swept

DEADLINE_S = 180


def _wait_for_reports(journal: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not journal.exists() or journal.read_bytes().count(b'"event": "report"') < number:
        assert process.poll() is None, "the sweep has ended"
        assert time.monotonic() < end
        threading.Event().wait(0.05)


@pytest.mark.slow  # minutes; tests/unit/test_sweep_search.py and _schedule.py cut journals everywhere in seconds
def test_a_killed_driver_costs_only_time(ray_session: None, tmp_path: Path) -> None:
    """Kill -9 in the second trial: nothing is suggested anew, nothing is run again, the leaderboard is the same."""
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    settings = (
        f"data.sources={rows}",
        "sweep.space={adapter.r: {choice: [2, 4]}, train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}",
        "sweep.trials=2",
        "sweep.max_concurrent=1",
        "sweep.searcher.startup_trials=1",
    )
    calm = swept(tmp_path, *settings, "run.name=calm")
    command = [sys.executable, "-m", "raytune_ds.sweep", f"run.storage={tmp_path}", "run.name=killed"]
    journal = tmp_path / "killed" / "journal.jsonl"
    environment = environment_with({"RAY_ADDRESS": "local"})
    with subprocess.Popen(
        [*command, *SETTINGS, *settings], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        _wait_for_reports(journal, len(calm.trials[0].reports) + 1, process)
        os.kill(process.pid, signal.SIGKILL)
    begun = Journal(str(journal)).events
    ended = swept(tmp_path, *settings, "run.name=killed")
    assert [{k: v for k, v in row.items() if k != "run"} for row in leaderboard(ended)] == [
        {k: v for k, v in row.items() if k != "run"} for row in leaderboard(calm)
    ]
    events = Journal(str(journal)).events
    assert events[: len(begun)] == begun
    assert [e["trial"] for e in events if e["event"] == "trial"] == [1, 2]
    told = [(e["trial"], e["report"]["number"]) for e in events if e["event"] == "report"]
    assert len(told) == len(set(told))
