"""What a step is at, by name: labels in the code, which cost nothing worth telling while nobody hears of them.

A profile hears of them (profiling.py). A phase may lie in another one: the collective of an engine in its step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Literal

Phase = Literal[
    "fetch", "forward", "backward", "collective", "optimizer", "logging", "evaluation", "checkpoint"
]

Hearer = Callable[[Phase], AbstractContextManager[None]]
"""What is entered and left with each phase."""

_UNHEARD = nullcontext()
_hearer: ContextVar[Hearer | None] = ContextVar("hearer", default=None)


def phase(name: Phase) -> AbstractContextManager[None]:
    """For `with`: what is within is that phase of a step."""
    hearer = _hearer.get()
    return _UNHEARD if hearer is None else hearer(name)


def tell(hearer: Hearer | None) -> None:
    """From now on `hearer` hears of the phases of this thread, or nobody."""
    _hearer.set(hearer)
