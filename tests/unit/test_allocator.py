"""What freed memory costs: in a process of its own, for an allocator is that of a whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from raytune_ds.allocator import jemalloc
from raytune_ds.early import JEMALLOC

# Freed and asked for again ten times: pages that come anew from the system are faults.
PROGRAM = """
import resource, sys
from raytune_ds.allocator import keep_freed_memory

size = 48_000_000

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = faults()
assert keep_freed_memory()
faults()
print(anew, faults())
"""

LEFT_OVER = """
import psutil
from raytune_ds.allocator import keep_freed_memory

b"x" * 48_000_000
before = psutil.Process().memory_info().rss
assert keep_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""

GLIBC = pytest.param({}, marks=pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc"))
# One that would give everything back at once.
WITH_JEMALLOC = pytest.param(
    {**jemalloc(JEMALLOC), "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:0"},
    marks=pytest.mark.skipif(sys.platform != "linux", reason="Ray brings it for Linux"),
)


@pytest.mark.parametrize("variables", [GLIBC, WITH_JEMALLOC])
def test_freed_memory_is_taken_again_without_a_fault(variables: dict[str, str]) -> None:
    anew, kept = map(int, told_by(PROGRAM, variables).split())
    assert anew > 100_000
    assert kept < anew / 100


@pytest.mark.skipif(sys.platform != "linux", reason="Ray brings it for Linux")
def test_what_was_freed_before_goes_back_once_more() -> None:
    kept_so_far = {**jemalloc(JEMALLOC), "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:-1"}
    assert int(told_by(LEFT_OVER, kept_so_far)) > 40_000_000


def told_by(program: str, variables: dict[str, str]) -> str:
    """What a process that begins with these variables prints."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    ).stdout
