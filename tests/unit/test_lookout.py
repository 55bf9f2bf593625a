"""When nodes that are about to go are looked for."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback

from raytune_ds import lookout
from raytune_ds.lookout import AFTER_S, Lookout


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The groups of workers that Ray Train's watcher was begun for."""
    groups: list[Any] = []
    monkeypatch.setattr(
        PreemptionCallback, "after_worker_group_start", lambda self, group: groups.append(group)
    )
    return groups


def test_a_run_starts_before_somebody_looks_out(watched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now)
    callback = Lookout()
    callback.after_worker_group_start("first")
    callback.after_worker_group_poll_status(None)
    assert watched == []
    now = AFTER_S + 1
    callback.after_worker_group_poll_status(None)
    callback.after_worker_group_poll_status(None)
    assert watched == ["first"]


def test_once_a_node_has_gone_the_next_may_be_about_to(
    watched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group that is no more is not watched late."""
    now = 0.0
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now)
    callback = Lookout()
    callback.after_worker_group_start("first")
    callback.after_worker_group_abort(None)
    callback.after_worker_group_start("second")
    assert watched == ["second"]
    now = 3 * AFTER_S
    callback.after_worker_group_poll_status(None)
    assert watched == ["second"]
