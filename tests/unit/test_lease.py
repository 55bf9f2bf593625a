"""One driver a run: who lives is respected, who is dead is not in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from raytune_ds import lease, storage
from raytune_ds.errors import UserError
from raytune_ds.lease import Holder, held

HOLD = """
import sys
from raytune_ds.lease import held
with held(sys.argv[1], "it"):
    print("in", flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths."""
    for name, value in (("BEAT_S", 0.05), ("SILENCE_S", 0.3), ("SETTLE_S", 0.01)):
        monkeypatch.setattr(lease, name, value)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has it."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "driver.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield process
        process.kill()


def foreign(path: str) -> Holder:
    """The file of a driver on another machine."""
    holder = replace(Holder.here(), processes="another boot", host="elsewhere", id="theirs")
    storage.write_json(path, asdict(holder))
    return holder


def test_it_is_there_while_it_is_held_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "driver.json"
    with held(str(path), "it"):
        first = json.loads(path.read_text())
        assert (first["pid"], first["count"]) == (os.getpid(), 0)
        while json.loads(path.read_text())["count"] < 2:
            threading.Event().wait(0.01)
    assert not path.exists()


def test_a_driver_that_lives_is_named(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    with (
        pytest.raises(UserError, match=rf"it: another driver is at it: process {other.pid} on "),
        held(str(tmp_path / "driver.json"), "it"),
    ):
        pass
    assert json.loads((tmp_path / "driver.json").read_text())["pid"] == other.pid


def test_a_killed_driver_is_not_in_the_way(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    other.kill()
    other.wait()
    with held(str(tmp_path / "driver.json"), "it"):
        assert json.loads((tmp_path / "driver.json").read_text())["pid"] == os.getpid()


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    path = str(tmp_path / "driver.json")
    storage.write_json(path, asdict(replace(Holder.here(), started=1.0, id="theirs")))
    with held(path, "it"):
        pass


def test_a_silent_driver_of_another_machine_is_not_in_the_way(bucket: str) -> None:
    path = f"{bucket}/one/driver.json"
    foreign(path)
    with held(path, "it"):
        assert storage.read_json(path)["pid"] == os.getpid()
    assert not storage.exists(path)


def test_a_driver_of_another_machine_that_counts_is_named(bucket: str) -> None:
    path = f"{bucket}/one/driver.json"
    holder, end = foreign(path), threading.Event()

    def count() -> None:
        number = 0
        while not end.wait(0.02):
            number += 1
            storage.write_json(path, asdict(replace(holder, count=number)))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} on elsewhere"), held(path, "it"):
            pass
    finally:
        end.set()
        thread.join()
    assert storage.read_json(path)["id"] == "theirs"


def test_a_driver_that_was_taken_over_stops_and_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, signals = str(tmp_path / "driver.json"), list[int]()
    told = threading.Event()
    monkeypatch.setattr(lease.os, "kill", lambda pid, number: (signals.append(number), told.set()))
    with held(path, "it"):
        foreign(path)
        assert told.wait(10)
    assert signals == [signal.SIGTERM]
    assert storage.read_json(path)["id"] == "theirs"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 3}', '"text"'])
def test_a_damaged_file_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / "driver.json").write_text(content)
    with held(str(tmp_path / "driver.json"), "it"):
        pass


def test_storage_that_fails_for_a_while_is_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "driver.json")
    with held(path, "it"):
        write, failed = storage.write_json, threading.Event()

        def fail(*_: object) -> None:
            failed.set()
            raise OSError("full")

        monkeypatch.setattr(storage, "write_json", fail)
        assert failed.wait(10)
        monkeypatch.setattr(storage, "write_json", write)
        count = storage.read_json(path)["count"]
        while storage.read_json(path)["count"] <= count:
            threading.Event().wait(0.01)


@pytest.mark.parametrize("deed", ["ends", "dies"])
def test_who_is_patient_waits_for_the_other(
    tmp_path: Path, other: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str], deed: str
) -> None:
    entered = threading.Event()

    def wait() -> None:
        with held(str(tmp_path / "driver.json"), "it", patient=True):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not entered.wait(0.5)
    if deed == "ends":
        other.communicate(b"\n")
    else:
        other.kill()
        other.wait()
    assert entered.wait(10)
    thread.join()
    assert capsys.readouterr().out.count("another driver is at it") == 1
    assert not (tmp_path / "driver.json").exists()
