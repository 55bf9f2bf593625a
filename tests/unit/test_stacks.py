"""Processes write their stacks whatever they are stuck in; those that can't are told of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from raytune_ds import stacks
from raytune_ds.stacks import Place

STUCK = """
import ctypes, sys
from raytune_ds.stacks import on_demand
def stuck_in_native_code(file):
    print(file, flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter
with on_demand("node") as place:
    stuck_in_native_code(place.file)
"""


@contextmanager
def stuck() -> Iterator[tuple[psutil.Process, Place]]:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield (
            psutil.Process(process.pid),
            Place(
                "node",
                process.pid,
                psutil.Process(process.pid).create_time(),
                process.stdout.readline().strip(),
            ),
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(process: psutil.Process, state: str) -> None:
    end = time.monotonic() + 10
    while process.status() != state:
        assert time.monotonic() < end, process.status()


def test_a_process_that_holds_the_interpreter_tells_where_it_is() -> None:
    with stuck() as (_, place):
        text = stacks.of_each({3: place})[3]
    assert f"process {place.pid}, " in text
    assert "in stuck_in_native_code" in text


def test_a_stopped_process_tells_where_it_is() -> None:
    with stuck() as (process, place):
        process.suspend()
        wait_for(process, psutil.STATUS_STOPPED)
        text = stacks.of_each({0: place})[0]
        wait_for(process, psutil.STATUS_STOPPED)  # as it was found
    assert f"process {place.pid}, stopped" in text
    assert "in stuck_in_native_code" in text


def test_of_a_process_that_is_gone_that_is_said() -> None:
    with stuck() as (process, place):
        assert stacks.kill_each({0: place}) == []
        process.wait(30)
        assert stacks.of_each({0: place}) == {0: f"process {place.pid} is gone\n"}
        assert stacks.kill_each({0: place}) == []


def test_another_process_of_that_number_is_left_alone() -> None:
    with stuck() as (process, place):
        other = replace(place, started=place.started - 60)
        assert stacks.of_each({0: other}) == {0: f"process {place.pid} is gone\n"}
        assert stacks.kill_each({0: other}) == []
        assert process.is_running()


def test_those_that_cannot_be_ended_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "WAIT_S", 0.3)
    monkeypatch.setattr(stacks, "_send", lambda *_: None)
    with stuck() as (_, place):
        assert stacks.kill_each({7: place}) == [7]


def test_nothing_is_left_of_a_process_that_ends_well_and_a_late_signal_does_not_end_it() -> None:
    with stacks.on_demand("node") as place:
        assert "test_nothing_is_left_of" in stacks.of_each({0: place})[0]
    assert not Path(place.file).exists()
    os.kill(os.getpid(), stacks.SIGNAL)
