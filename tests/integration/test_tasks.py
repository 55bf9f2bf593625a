"""Tasks for all CPUs: all is done, not too much of it waits, and what dies is done again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raytune_ds.data import tasks
from raytune_ds.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_session")


def numbers(share: int, most: int) -> Iterator[list[int]]:
    """As many as the number of the share."""
    yield from ([share, number] for number in range(min(share, most)))


def doubled(item: list[int]) -> list[int]:
    return [2 * number for number in item]


@pytest.mark.parametrize("ahead", [1, 4])
def test_all_that_is_yielded_is_worked_on(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """By more tasks than there are at once, from shares of which some have much and one has nothing."""
    monkeypatch.setattr(tasks, "_AHEAD", ahead)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", 2)
    with tasks.each_read(numbers, [30, 0, 1, 2, 7], {"most": 20}, doubled) as done:
        assert sorted(done) == [[2 * share, 2 * n] for share in (1, 2, 7, 30) for n in range(min(share, 20))]


def test_nothing_is_read_of_nothing() -> None:
    with tasks.each_read(numbers, [0], {"most": 20}, doubled) as done:
        assert list(done) == []
    with tasks.each(doubled, []) as done:
        assert list(done) == []


def test_no_more_is_begun_than_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: 1)

    def touch(number: int) -> int:
        (tmp_path / str(number)).touch()
        return number

    with tasks.each(touch, range(100)) as done:
        taken = [next(done) for _ in range(10)]
    assert len(taken) <= len(list(tmp_path.iterdir())) < len(taken) + tasks._AHEAD


def test_no_more_is_read_than_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: 1)

    def read(share: int) -> Iterator[int]:
        for number in range(100):
            (tmp_path / str(number)).touch()
            yield number

    def work(number: int) -> int:
        return number

    with tasks.each_read(read, [0], {}, work) as done:
        taken = [next(done) for _ in range(10)]
        # What waits to be worked on, to be asked for, and the next, which is made already.
        most = len(taken) + tasks._AHEAD + tasks._YIELDED_AHEAD + 1
        assert len(taken) <= len(list(tmp_path.iterdir())) <= most


def test_little_is_worked_on_beside_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many as there are CPUs beside it: it is a worker soon, and another process would begin for longer."""
    monkeypatch.setattr(tasks, "num_cpus", lambda: 2)
    monkeypatch.setattr(tasks, "_HELD_BACK_S", 1e6)
    running, begin = list[int](), tasks._Tasks.begin

    def noted(kind: tasks._Tasks, item: object) -> None:
        begin(kind, item)
        if not isinstance(item, int):
            running.append(len(kind.running))

    monkeypatch.setattr(tasks._Tasks, "begin", noted)
    all_done = tmp_path / "all-done"
    os.mkfifo(all_done)

    def read(share: int) -> Iterator[str]:
        yield from (name for name in ("first", "second", "last"))  # Ray sends to what is yielded from
        all_done.read_text()

    def work(name: str) -> str:
        if name == "last":
            all_done.write_text("now")
        return name

    with tasks.each_read(read, [0], {}, work) as done:
        assert sorted(done) == ["first", "last", "second"]
    assert running == [1, 1, 1]


def test_an_error_of_a_task_is_told_and_ends_the_others(tmp_path: Path) -> None:
    def work(number: int) -> None:
        if number == 0:
            while not any(tmp_path.iterdir()):
                threading.Event().wait(0.02)
            raise ValueError("the first is bad")
        (tmp_path / str(os.getpid())).touch()
        threading.Event().wait()

    with pytest.raises(ValueError, match="the first is bad"), tasks.each(work, range(4)) as done:
        list(done)
    ended = [int(path.name) for path in tmp_path.iterdir()]
    assert ended
    processes = [psutil.Process(pid) for pid in ended if psutil.pid_exists(pid)]
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_a_mistake_that_a_reader_finds_is_told_as_it_is() -> None:
    def read(share: int) -> Iterator[list[int]]:
        yield [share]
        raise UserError("there is no such data set")

    with pytest.raises(UserError) as caught, tasks.each_read(read, [1], {}, doubled) as done:
        list(done)
    assert str(caught.value) == "there is no such data set"


def test_what_a_process_was_at_that_died_is_done_again(tmp_path: Path) -> None:
    """Of those that work, and of those that read: what they yielded before is not read twice."""

    def die_once(place: Path) -> None:
        if not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def read(share: int) -> Iterator[int]:
        for number in range(6):
            if number == 3:
                die_once(tmp_path / "reader")
            yield number

    def work(number: int) -> int:
        if number == 2:
            die_once(tmp_path / "worker")
        return number

    with tasks.each_read(read, [0], {}, work) as done:
        assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {"reader", "worker"}
