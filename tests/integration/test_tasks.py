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
@pytest.mark.parametrize("cpus", [1, 4])
def test_all_that_is_yielded_is_worked_on(monkeypatch: pytest.MonkeyPatch, ahead: int, cpus: int) -> None:
    """By more tasks than there are at once, from shares of which some have much and some have nothing."""
    monkeypatch.setattr(tasks, "num_cpus", lambda: cpus)
    monkeypatch.setattr(tasks, "_AHEAD", ahead)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", 2)
    with tasks.each_read(numbers, [0, 30, 0, 1, 2, 7, 0], {"most": 20}, doubled) as done:
        assert sorted(done) == [[2 * share, 2 * n] for share in (1, 2, 7, 30) for n in range(min(share, 20))]


@pytest.mark.parametrize("workers_a_reader", [1, 8])
def test_nothing_is_read_of_nothing(monkeypatch: pytest.MonkeyPatch, workers_a_reader: int) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: 2)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", workers_a_reader)
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


@pytest.mark.parametrize("workers_a_reader", [1, 8])
def test_no_more_is_read_than_may_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers_a_reader: int
) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: 2)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", workers_a_reader)

    def read(share: int) -> Iterator[int]:
        for number in range(100):
            (tmp_path / str(number)).touch()
            yield number

    def work(number: int) -> int:
        return number

    with tasks.each_read(read, [0], {}, work) as done:
        taken = [next(done) for _ in range(10)]
        # What waits to be worked on, to be asked for, and the next, which is made already.
        most = len(taken) + 2 * tasks._AHEAD + tasks._YIELDED_AHEAD + 1
        assert len(taken) <= len(list(tmp_path.iterdir())) <= most


@pytest.mark.parametrize("cpus", [1, 2])
def test_where_there_are_few_cpus_who_asks_reads(cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: cpus)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", 1)

    def read(share: int) -> Iterator[int]:
        yield os.getpid()

    def work(reader: int) -> int:
        return reader

    with tasks.each_read(read, range(3), {}, work) as done:
        assert (set(done) == {os.getpid()}) == (cpus == 1)


@pytest.mark.timeout(60)
def test_what_is_read_here_is_worked_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many tasks as there is room for: either of these waits for the other."""
    monkeypatch.setattr(tasks, "num_cpus", lambda: 2)
    os.mkfifo(tmp_path / "between")

    def read(share: int) -> Iterator[str]:
        yield from ("hears", "tells")

    def work(name: str) -> str:
        between = tmp_path / "between"
        return between.read_text() if name == "hears" else str(between.write_text("told"))

    with tasks.each_read(read, [0], {}, work) as done:
        assert sorted(done) == ["4", "told"]


def test_a_cluster_that_grows_gets_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = [1]
    monkeypatch.setattr(tasks, "num_cpus", lambda: cpus[0])
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", 1)

    def read(share: int) -> Iterator[tuple[int, int]]:
        yield from ((share, os.getpid()) for _ in range(20))

    def work(read: tuple[int, int]) -> tuple[int, int]:
        return read

    with tasks.each_read(read, range(4), {}, work) as done:
        found = [next(done)]
        cpus[0] = 4
        found += done
    assert sorted(share for share, _ in found) == sorted(20 * [0, 1, 2, 3])
    assert {share for share, reader in found if reader == os.getpid()} == {0}


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


@pytest.mark.parametrize("workers_a_reader", [1, 8])
def test_a_mistake_that_a_reader_finds_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, workers_a_reader: int
) -> None:
    monkeypatch.setattr(tasks, "num_cpus", lambda: 2)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", workers_a_reader)

    def read(share: int) -> Iterator[list[int]]:
        yield [share]
        raise UserError("there is no such data set")

    with pytest.raises(UserError) as caught, tasks.each_read(read, [1], {}, doubled) as done:
        list(done)
    assert str(caught.value) == "there is no such data set"


def test_what_a_process_was_at_that_died_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that work, and of those that read: what they yielded before is not read twice."""
    monkeypatch.setattr(tasks, "num_cpus", lambda: 2)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", 1)

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
