"""A worker inside Ray Train: when the end of a node's notice is near."""

from __future__ import annotations

import time

import pytest

from raytune_ds import rayworker


@pytest.mark.parametrize(("left_s", "near"), [(60, False), (15, True), (-5, True)])
def test_the_end_of_a_notice_is_near(monkeypatch: pytest.MonkeyPatch, left_s: float, near: bool) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert rayworker._is_near(int((1000 + left_s) * 1000)) == near


@pytest.mark.parametrize("deadline_ms", [None, 0])
def test_a_notice_without_an_end_is_never_near(deadline_ms: int | None) -> None:
    assert not rayworker._is_near(deadline_ms)
