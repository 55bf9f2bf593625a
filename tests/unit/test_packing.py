"""First-fit-decreasing: the textbook's packs, nearly full, in nearly linear work."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds.data.packing import first_fit_decreasing


def textbook(lengths: list[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing as it is defined, looking at every pack."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for pack, free in enumerate(room):  # noqa: B007  # the pack it stops at
            if free >= lengths[index]:
                break
        else:
            pack = len(packs)
            packs.append([])
            room.append(capacity)
        packs[pack].append(index)
        room[pack] -= lengths[index]
    return packs


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_the_textbook(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 60))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    packs = first_fit_decreasing(np.array(lengths, np.int64), capacity)
    assert packs == textbook(lengths, capacity)
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))


def test_a_document_may_fill_a_pack_but_not_more() -> None:
    assert first_fit_decreasing(np.array([8, 8]), 8) == [[0], [1]]
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit a pack of 8"):
        first_fit_decreasing(np.array([3, 9]), 8)


def log_normal(count: int) -> np.ndarray:
    """Lengths as instruction data have them, around 160 tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(160), 0.8, count)
    return np.clip(lengths.astype(np.int64), 1, 2048)


def test_packs_of_usual_lengths_are_full() -> None:
    lengths = log_normal(5000)
    packs = first_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(packs) * 2048) >= 0.98


def lines_run(lengths: np.ndarray) -> int:
    """Lines of Python that packing takes: a measure of work that does not depend on the machine."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        first_fit_decreasing(lengths, 2048)
    finally:
        sys.settrace(before)
    return count


def test_twice_the_documents_take_little_more_than_twice_the_work() -> None:
    # Looking at every pack would take four times as much.
    assert lines_run(log_normal(4000)) < 2.5 * lines_run(log_normal(2000))
