"""metrics.jsonl: every step once and in order, after a restart as after a full disk."""

from __future__ import annotations

import errno
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_ds import rundir, storage
from raytune_ds.rundir import MetricsFile, RunDir, parse_lines


def refuse_warnings(text: str) -> None:
    raise AssertionError(f"warned: {text}")


def opened(run: RunDir, last_step: int = -1, warn: Callable[[str], None] = refuse_warnings) -> MetricsFile:
    return MetricsFile(run, last_step, warn)


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "note": "é" * (step % 7)}


def steps(run: RunDir) -> list[int]:
    return [line["step"] for line in run.read_metrics()]


# ---- restarts -------------------------------------------------------------------------------------


def test_paths_and_name() -> None:
    run = RunDir("s3://bucket/runs/one")
    assert run.name == "one"
    names = [
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "final",
        "result.json",
        "ds_config.json",
        "memory.json",
        "tensorboard",
    ]
    paths = [run.config, run.metrics, run.checkpoints, run.final, run.result, run.ds_config, run.memory]
    paths.append(run.tensorboard)
    assert paths == [f"s3://bucket/runs/one/{name}" for name in names]


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    run = RunDir(f"{tmp_path}/new/run")
    assert run.read_metrics() == []
    file = opened(run)
    assert Path(run.metrics).read_bytes() == b""
    for step in range(1, 4):
        file.write(row(step))
        assert run.read_metrics() == [row(n) for n in range(1, step + 1)]
    file.close()


def test_after_a_restart_later_steps_are_dropped(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    first = opened(run)
    for step in range(1, 6):
        first.write(row(step))
        if step == 3:
            first.write({"step": 3, "eval_loss": 0.5})
    # It died behind step 5 without closing, and the newest checkpoint is of step 3.
    second = opened(run, last_step=3)
    assert steps(run) == [1, 2, 3, 3]
    second.write({"step": 4, "loss": 9.0})
    second.close()
    assert run.read_metrics() == [
        row(1),
        row(2),
        row(3),
        {"step": 3, "eval_loss": 0.5},
        {"step": 4, "loss": 9.0},
    ]
    opened(run).close()
    assert run.read_metrics() == [], "begun anew"


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_line_that_was_not_finished_is_passed_over(tmp_path: Path, cut: int) -> None:
    run = RunDir(str(tmp_path))
    Path(run.metrics).write_bytes(b'{"step": 1, "loss": 2.5}\n' + b'{"step": 2, "loss": 2.5}\n'[:cut])
    file = opened(run, last_step=2)
    file.write(row(3))
    file.close()
    assert steps(run) == [1, 3]


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    file = opened(run)
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-4, "skipped": True})
    file.close()
    assert run.read_metrics() == [{"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4, "skipped": True}]


def test_parse_lines() -> None:
    assert parse_lines(b"") == parse_lines(b"\n") == parse_lines(b'{"step": 1}') == []
    assert parse_lines(b'{"step": 1}\n\n{"step": 2}\n{"st') == [{"step": 1}, {"step": 2}]


# ---- a full disk ----------------------------------------------------------------------------------


class Disk:
    """An unbuffered file on a disk with so much room: it takes what fits, and nothing once it is full."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.room = 10**9
        self.failures = 0
        self.closed = False

    def write(self, content: bytes) -> int:
        if content and self.room == 0:
            self.failures += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = content[: self.room]
        self.room -= len(taken)
        return int(self._file.write(taken))

    def close(self) -> None:
        self._file.close()
        self.closed = True


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    """The disk under every metrics file that is opened, in a list."""
    disks: list[Disk] = []

    class Opened(type(Path())):  # type: ignore[misc]
        def open(self, *args: Any, **kwargs: Any) -> Any:
            disks.append(Disk(super().open(*args, **kwargs)))
            return disks[-1]

    monkeypatch.setattr(rundir, "Path", Opened)
    return disks


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, disk: list[Disk]) -> None:
    run, warnings = RunDir(str(tmp_path)), list[str]()
    file = opened(run, warn=warnings.append)
    file.write(row(1))
    disk[0].room = 0
    for step in range(2, 6):
        file.write(row(step))
        file.flush()
    assert steps(run) == [1]
    assert warnings == [
        f"{run.metrics} can't be written (No space left on device); its lines are kept until it can"
    ]
    disk[0].room = 10**9
    file.write(row(6))
    assert run.read_metrics() == [row(step) for step in range(1, 7)]
    file.close()
    assert run.read_metrics() == [row(step) for step in range(1, 7)]
    assert len(warnings) == 1


@pytest.mark.parametrize("room", range(1, 60, 7))
def test_a_line_of_which_a_part_fitted_is_completed(tmp_path: Path, disk: list[Disk], room: int) -> None:
    run, warnings = RunDir(str(tmp_path)), list[str]()
    file = opened(run, warn=warnings.append)
    disk[0].room = room
    file.write(row(1))
    file.write(row(2))
    assert disk[0].failures > 0
    on_disk = Path(run.metrics).read_bytes()
    assert len(on_disk) == room
    disk[0].room = 10**9
    file.write(row(3))
    assert Path(run.metrics).read_bytes().startswith(on_disk)
    assert run.read_metrics() == [row(1), row(2), row(3)]
    assert len(warnings) == 1


@pytest.mark.parametrize("seed", range(20))
def test_however_room_comes_and_goes_every_line_is_there_once(
    tmp_path: Path, disk: list[Disk], seed: int
) -> None:
    rng, run, warnings = random.Random(seed), RunDir(str(tmp_path)), list[str]()
    file = opened(run, warn=warnings.append)
    outages, behind = 0, False
    for step in range(1, 60):
        disk[0].room = rng.choice([0, 0, rng.randrange(200), 10**6])
        failures = disk[0].failures
        file.write(row(step))
        failed = disk[0].failures > failures
        outages += failed and not behind
        behind = failed
        written = run.read_metrics()
        assert written == [row(n) for n in range(1, len(written) + 1)]
        assert failed or len(written) == step
        assert len(warnings) == outages, "one an outage"
    assert outages > 1
    disk[0].room = 10**9
    file.write(row(60))
    file.close()
    assert run.read_metrics() == [row(step) for step in range(1, 61)]


@pytest.mark.parametrize("last", ["flush", "close"])
def test_lines_that_waited_are_written_at_the_end(tmp_path: Path, disk: list[Disk], last: str) -> None:
    run, warnings = RunDir(str(tmp_path)), list[str]()
    file = opened(run, warn=warnings.append)
    disk[0].room = 30
    for step in range(1, 4):
        file.write(row(step))
    disk[0].room = 10**9  # the last checkpoint was pruned, say
    getattr(file, last)()
    assert run.read_metrics() == [row(1), row(2), row(3)]


def test_a_run_ends_on_a_full_disk_all_the_same(tmp_path: Path, disk: list[Disk]) -> None:
    run, warnings = RunDir(str(tmp_path)), list[str]()
    file = opened(run, warn=warnings.append)
    file.write(row(1))
    disk[0].room = 3
    file.write(row(2))
    file.close()
    assert disk[0].closed
    assert len(warnings) == 1
    # And the next attempt finds what was written.
    again = opened(run, last_step=2)
    again.write(row(2))
    again.close()
    assert run.read_metrics() == [row(1), row(2)]


# ---- object stores --------------------------------------------------------------------------------


def test_an_object_store_gets_the_whole_file_at_each_flush(bucket: str, tmp_path: Path) -> None:
    run = RunDir(f"{bucket}/one")
    file = opened(run)
    assert steps(run) == []
    for step in (1, 2, 3):
        file.write(row(step))
    assert steps(run) == []
    file.flush()
    assert steps(run) == [1, 2, 3]
    file = opened(run, last_step=2)
    assert steps(run) == [1, 2]
    file.write({"step": 3, "again": True})
    file.close()
    lines = (tmp_path / "bucket/runs/one/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(1), row(2), {"step": 3, "again": True}]


def test_lines_wait_while_an_object_store_does_not_answer(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, warnings = RunDir(f"{bucket}/one"), list[str]()
    file = opened(run, warn=warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", unreachable)
        for step in (1, 2):
            file.write(row(step))
            file.flush()
    assert warnings == [f"{run.metrics} can't be written (no route to host); its lines are kept until it can"]
    file.flush()
    assert steps(run) == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", unreachable)
        file.write(row(3))
        file.close()
    assert len(warnings) == 2, "one an outage"


def unreachable(path: str, content: bytes) -> None:
    raise OSError("no route to host")


def test_a_restart_writes_nothing_that_is_there_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk every restart would fail otherwise."""
    run = RunDir(str(tmp_path))
    first = opened(run)
    first.write(row(1))
    first.close()
    monkeypatch.setattr(storage, "write_bytes", unreachable)
    opened(run, last_step=1).close()
    assert steps(run) == [1]
