"""What freed memory costs: in a process of its own, for malloc's settings are of a whole process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_taken_again_without_a_fault() -> None:
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    anew, kept = map(int, told.stdout.split())
    assert anew > 10_000
    assert kept < anew / 100
