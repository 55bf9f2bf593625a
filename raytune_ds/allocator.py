"""How memory is given out to a process that computes on the CPU.

A step allocates and frees the same large tensors over and over. Each page that comes anew from the system costs a fault
and is zeroed first: a sixth of the time of a step with all parameters. So what was freed is to stay with the process.

In glibc's heap small things that stay come to lie between large ones that go, and what is freed is too short for what
is asked for next. jemalloc keeps sizes apart: a Qwen2 shape of 28M parameters, all of them trained, takes 790 MiB with
it and 870 without, at the same speed. It has to be there before a process begins.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_PRELOAD, _SETTINGS = "LD_PRELOAD", "MALLOC_CONF"
VARIABLES = (_PRELOAD, _SETTINGS)
"""Of the environment, by which a process gets its allocator."""
# jemalloc's name for all arenas at once.
_ALL_ARENAS = 4096
# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def jemalloc(library: Path) -> dict[str, str]:
    """Environment variables with which a process begins with jemalloc, if the library is there."""
    # By default what is larger than 8 MiB has an arena of its own, which keeps nothing.
    return {_PRELOAD: str(library), _SETTINGS: "oversize_threshold:0"} if library.is_file() else {}


def keep_freed_memory() -> bool:
    """Makes the C library give freed memory to whoever asks next, instead of back to the system; False if it can't.

    What was freed before this goes back once more: what it took to read the weights is not what training asks for.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        return _kept_by_jemalloc(library.mallctl)
    return hasattr(library, "mallopt") and _kept_by_glibc(library)


def _kept_by_jemalloc(control: Any) -> bool:
    def write(name: str, value: ctypes.c_ssize_t) -> bool:
        return control(name.encode(), None, None, ctypes.byref(value), ctypes.sizeof(value)) == 0

    arenas, size = ctypes.c_uint(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_uint))
    control(b"arenas.narenas", ctypes.byref(arenas), ctypes.byref(size), None, 0)
    control(f"arena.{_ALL_ARENAS}.purge".encode(), None, None, None, 0)
    never = ctypes.c_ssize_t(-1)
    for arena in range(arenas.value):
        write(f"arena.{arena}.dirty_decay_ms", never)  # an arena that nobody uses yet refuses
    return write("arenas.dirty_decay_ms", never)  # of arenas to come


def _kept_by_glibc(library: ctypes.CDLL) -> bool:
    library.malloc_trim(0)
    # No memory of its own for anything large: a threshold for that is limited by versions before 2.35.
    return all([library.mallopt(_M_MMAP_MAX, 0) == 1, library.mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1])
