"""Tasks for all CPUs: all is done, not too much of it waits, and what dies is done again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ds.data import tasks

pytestmark = pytest.mark.usefixtures("ray_session")


def numbers(share: int, upto: int) -> Iterator[list[int]]:
    yield from ([share, number] for number in range(upto))


def doubled(item: list[int]) -> list[int]:
    return [2 * number for number in item]


def test_all_that_is_yielded_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By more tasks than there are at once, from shares of which one has nothing."""
    monkeypatch.setattr(tasks, "_AHEAD", 1)
    given = tasks.stream(numbers, range(5), cpus=0.1, at_once=2, upto=7)
    done = tasks.each(doubled, given, cpus=0.5)
    assert sorted(done) == [[2 * share, 2 * number] for share in range(5) for number in range(7)]
    assert (
        list(tasks.each(doubled, tasks.stream(numbers, range(2), cpus=0.1, at_once=2, upto=0), cpus=0.5))
        == []
    )


def test_no_more_is_begun_than_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: 1)

    def touch(number: int) -> int:
        (tmp_path / str(number)).touch()
        return number

    done = tasks.each(touch, range(100), cpus=0.5)
    taken = [next(done) for _ in range(10)]
    done.close()
    assert len(taken) <= len(list(tmp_path.iterdir())) < len(taken) + tasks._AHEAD


def test_an_error_of_a_task_is_told_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_STOP_S", 60)

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("the fourth is bad")
        time.sleep(60 if number > 3 else 0)
        return number

    began = time.monotonic()
    with (
        contextlib.closing(tasks.each(work, range(8), cpus=0.5)) as done,
        pytest.raises(ValueError, match="fourth"),
    ):
        list(done)
    assert time.monotonic() - began < 30


def test_what_a_reader_can_not_read_is_told() -> None:
    def read(share: int) -> Iterator[list[int]]:
        yield [share]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(tasks.each(doubled, tasks.stream(read, [1], cpus=0.1, at_once=1), cpus=0.5))


def test_the_work_of_a_process_that_died_is_done_again(tmp_path: Path) -> None:
    def work(item: list[int]) -> list[int]:
        place = tmp_path / "died"
        if item == [0, 2] and not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    given = tasks.stream(numbers, [0], cpus=0.1, at_once=1, upto=4)
    assert sorted(tasks.each(work, given, cpus=0.5)) == [[0, number] for number in range(4)]
    assert (tmp_path / "died").exists()
