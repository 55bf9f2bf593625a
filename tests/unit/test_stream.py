"""The first steps are read at once, and what reads ahead begins behind them. Ray Data itself is not started here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from raytune_ds.data import stream as module
from raytune_ds.data.stream import OWN_STEPS, stream


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were read in this process; a step's batches are its number."""
    steps_read: list[int] = []

    def read(store: Any, split: str, share: Any, steps: range) -> Iterator[Any]:
        for step in steps:
            steps_read.append(step)
            yield step

    monkeypatch.setattr(module, "read", read)
    return steps_read


@pytest.mark.parametrize("steps", [range(0), range(3, 4), range(3, 6), range(3, 7), range(9)])
def test_every_step_comes_once_and_in_order(
    read_here: list[int], monkeypatch: pytest.MonkeyPatch, steps: range
) -> None:
    asked: list[range] = []

    def ahead(store: Any, split: str, share: Any, steps: range, runtime_env: Any) -> Iterator[Any]:
        asked.append(steps)
        yield from steps

    monkeypatch.setattr(module, "_ahead", ahead)
    batches: Any = stream(None, "train", None, steps)  # type: ignore[arg-type]
    assert list(batches) == list(steps)
    assert read_here == list(steps[:OWN_STEPS])
    assert asked == ([steps[OWN_STEPS:]] if len(steps) > OWN_STEPS else [])


def test_who_wants_no_more_after_the_first_step_does_not_wait(
    read_here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, closed = threading.Event(), threading.Event()

    def ahead(*_: Any) -> Iterator[Any]:
        try:
            may_go_on.wait(60)
            yield 1
        finally:
            closed.set()

    monkeypatch.setattr(module, "_ahead", ahead)
    batches: Any = stream(None, "train", None, range(5))  # type: ignore[arg-type]
    assert next(batches) == 0
    batches.close()
    assert not closed.is_set()
    may_go_on.set()
    del batches
    assert closed.wait(60), "what reads ahead would go on for ever"


def test_what_goes_wrong_ahead_is_heard_of(read_here: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def ahead(*_: Any) -> Iterator[Any]:
        raise OSError("storage is gone")
        yield

    monkeypatch.setattr(module, "_ahead", ahead)
    batches = stream(None, "train", None, range(OWN_STEPS + 1))  # type: ignore[arg-type]
    for _ in range(OWN_STEPS):
        next(batches)
    with pytest.raises(OSError, match="storage is gone"):
        next(batches)
