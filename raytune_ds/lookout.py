"""Looks for nodes that are about to go, as Ray Train does, but not while a run starts."""

from __future__ import annotations

import time
from typing import Any

from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback

# A node that goes gives notice of half a minute and more.
AFTER_S = 15.0


class Lookout(PreemptionCallback):  # type: ignore[misc]  # Ray's, untyped
    """Ray Train's own watcher of nodes, begun later: its process imports for seconds, on CPUs that new workers need."""

    def __init__(self) -> None:
        """Watches nothing yet."""
        super().__init__()
        self._unwatched: Any = None
        self._is_first, self._started = True, 0.0

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Once new workers are there. Where nodes have gone already the next may be about to."""
        if not self._is_first:
            super().after_worker_group_start(worker_group)
            return
        self._is_first = False
        self._unwatched, self._started = worker_group, time.monotonic()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Every two seconds."""
        if self._unwatched is not None and time.monotonic() - self._started > AFTER_S:
            super().after_worker_group_start(self._unwatched)
            self._unwatched = None

    def _stop_watcher(self) -> None:
        self._unwatched = None
        super()._stop_watcher()
