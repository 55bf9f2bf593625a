"""What Ray Train's controller knows, told to the mailbox."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import RestartingState

_GUESSES = "Some common causes include"


class Reporter(ControllerCallback, WorkerGroupCallback):
    """Tells the mailbox what Ray Train's controller knows: itself, each group of workers, and why one is replaced."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        """As the controller begins."""
        controller = ray.get_runtime_context().current_actor
        self._mailbox.controlled_by.remote(ray.cloudpickle.dumps(controller))

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Once new workers are there."""
        super().after_worker_group_start(worker_group)
        self._mailbox.held.remote(
            worker_group.get_worker_group_state().placement_group_handle.placement_group
        )

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Once new workers are at work."""
        places = {
            worker.distributed_context.world_rank: (worker.metadata.node_id, worker.metadata.pid)
            for worker in worker_group.get_workers()
        }
        self._mailbox.group.remote(places)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Before workers are asked to end."""
        self._mailbox.leave.remote()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        """Before workers are ended without asking."""
        self._mailbox.leave.remote()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Whenever the controller decides something."""
        # It comes again and again with the same state while there is no room for new workers.
        if isinstance(current_state, RestartingState) and current_state is not previous_state:
            self._mailbox.restart.remote(*_why(current_state.training_failed_error))


def _why(error: Exception) -> tuple[list[int], str]:
    """Which ranks died, and of what."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    # When one process is gone, the others' collectives fail: what they say of it explains nothing.
    gone = {rank: e for rank, e in failures.items() if isinstance(e, WorkerHealthCheckFailedError)}
    chosen = gone or failures
    first = next(iter(chosen.values()), error)
    if isinstance(first, WorkerHealthCheckTimeoutError):
        return list(chosen), "Ray could not reach it"
    reason = (str(first).strip() or type(first).__name__).splitlines()[-1].strip()
    return list(chosen), reason.partition(_GUESSES)[0].strip()
