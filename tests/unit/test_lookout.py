"""When nodes that are about to go are looked for."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback

from raytune_ds import lookout
from raytune_ds.lookout import AFTER_S, Lookout


def test_workers_start_before_somebody_looks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a group of workers, and never for one that is no more."""
    watched: list[Any] = []
    monkeypatch.setattr(
        PreemptionCallback, "after_worker_group_start", lambda self, group: watched.append(group)
    )
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
    callback.after_worker_group_start("second")
    callback.before_worker_group_shutdown(None)
    now = 3 * AFTER_S
    callback.after_worker_group_poll_status(None)
    assert watched == ["first"]
