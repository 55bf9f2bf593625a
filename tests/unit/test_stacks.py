"""Processes write their stacks whatever they are stuck in; those that can't are told of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from raytune_ds import stacks
from raytune_ds.stacks import Place

STUCK = """
import ctypes, sys
from raytune_ds.stacks import on_demand
def stuck_in_native_code():
    while True:
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter
with on_demand("node") as place:
    print(place.file, flush=True)
    stuck_in_native_code()
"""


@contextmanager
def stuck() -> Iterator[tuple[psutil.Process, Place]]:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield psutil.Process(process.pid), Place("node", process.pid, process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_process_that_holds_the_interpreter_tells_where_it_is() -> None:
    with stuck() as (_, place):
        text = stacks.of_each({3: place})[3]
    assert f"process {place.pid}, " in text
    assert "in stuck_in_native_code" in text


def test_a_stopped_process_tells_where_it_is() -> None:
    with stuck() as (process, place):
        process.suspend()
        text = stacks.of_each({0: place})[0]
    assert f"process {place.pid}, stopped" in text
    assert "in stuck_in_native_code" in text


def test_of_a_process_that_is_gone_that_is_said_and_its_file_goes() -> None:
    with stuck() as (process, place):
        stacks.kill_each({0: place})
        process.wait(30)
        assert not Path(place.file).exists()
        assert stacks.of_each({0: place}) == {0: f"process {place.pid} is gone\n"}
        stacks.kill_each({0: place})


def test_nothing_is_left_of_a_process_that_ends_well() -> None:
    with stacks.on_demand("node") as place:
        assert "test_nothing_is_left_of" in stacks.of_each({0: place})[0]
    assert not Path(place.file).exists()
