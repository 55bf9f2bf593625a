"""How the C library gives out memory to a process that computes on the CPU."""

from __future__ import annotations

import ctypes

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc give freed memory to whoever asks next, instead of back to the system; False with another C library.

    What was freed before this goes back once more: what it took to read the weights is not what training asks for.

    A step allocates and frees the same large tensors over and over, and each page that comes anew from the system costs
    a fault and is zeroed first: a sixth of the time of a step with all parameters, at the same peak.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    mallopt = library.mallopt
    library.malloc_trim(0)
    # No memory of its own for anything large: a threshold for that is limited by versions before 2.35.
    return all([mallopt(_M_MMAP_MAX, 0) == 1, mallopt(_M_TRIM_THRESHOLD, _NEVER) == 1])
