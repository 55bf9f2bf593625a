"""Between the workers of a run and its driver: what happens, what is wanted, and whether everybody lives.

Ray's own copying of every worker's output to the driver stays off, so a log holds each thing once and in order.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ds.config import ScalingConfig
from raytune_ds.metrics import RunMetrics
from raytune_ds.stacks import Place
from raytune_ds.watch import Beat, Watch

_GUESSES = "Some common causes include"
Event = tuple[str, dict[str, Any], float]
"""What happened, its content, and when, in seconds of the mailbox's clock."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Events on their way from the workers to the driver, and to Ray's metrics; and the driver's wishes back."""

    def __init__(self, run: str, scaling: ScalingConfig) -> None:
        self._events: list[Event] = []
        self._metrics, self._watch = (
            RunMetrics(run),
            Watch(scaling.hang_timeout_s, scaling.collective_timeout_s),
        )
        self._places: dict[int, Place] = {}
        self._verdicts: dict[int, asyncio.Future[bool]] = {}
        self._ended = False
        self._controller: Any = None
        self._stop = asyncio.Event()

    # ----------------------------------------------------------------------------------- from the workers

    def arrived(self, world_size: int) -> None:
        """The workers run; said by rank 0."""
        self._watch.begin()
        self._places = {}
        self.put("arrived", {"world_size": world_size})

    def put(self, kind: str, content: dict[str, Any]) -> None:
        """One more event."""
        self._events.append((kind, content, time.monotonic()))
        self._metrics.note(kind, content)

    def beat(self, beat: Beat, place: Place) -> None:
        """A worker's sign of life, and how to get at its process."""
        self._watch.note(beat, time.monotonic())
        self._places[beat.rank] = place

    async def verdict(self, step: int) -> bool:
        """Whether to train on after a step: for the workers, who wait for it."""
        return await self._verdict(step)

    async def stopped(self) -> None:
        """Comes back once the run is to stop."""
        await self._stop.wait()

    # -------------------------------------------------------------------------------- from the controller

    def controlled_by(self, controller: Any) -> None:
        """Which actor controls the run."""
        self._controller = controller

    def died(self, ranks: list[int], error: str) -> None:
        """Why the workers are to be restarted."""
        why = self._watch.explain(f"worker {', '.join(map(str, ranks))} died: {error}", time.monotonic())
        self.put("restart", {"text": why, "rank": ranks[0]})

    def leave(self) -> None:
        """The workers are about to be shut down."""
        self._watch.end()

    # ------------------------------------------------------------------------------------ from the driver

    def take(self) -> list[Event]:
        """All events since the last time; with it the metrics are kept alive."""
        self._metrics.publish()
        if (hang := self._watch.look(time.monotonic())) is not None:
            self.put("hang", {**asdict(hang), "places": self._places})
        events, self._events = self._events, []
        return events

    def controller(self) -> Any:
        """The actor that controls the run; None while there is none."""
        return self._controller

    async def judge(self, step: int, goes_on: bool) -> None:
        """The verdict. An end is one for good, should workers have been restarted meanwhile."""
        self._ended |= not goes_on
        for asked, future in {**self._verdicts, step: self._verdict(step)}.items():
            if (asked == step or self._ended) and not future.done():
                future.set_result(goes_on)

    async def stop(self) -> None:
        """The run is to stop, at the next step."""
        self._stop.set()

    def _verdict(self, step: int) -> asyncio.Future[bool]:
        future = self._verdicts.setdefault(step, asyncio.get_running_loop().create_future())
        if self._ended and not future.done():
            future.set_result(False)
        return future


def open_mailbox(run: str, scaling: ScalingConfig) -> Any:
    """A mailbox on the driver's node: losing another one must not make the run go dark."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote(run, scaling)  # type: ignore[attr-defined]


class RestartReporter(ray.train.UserCallback):
    """Tells the mailbox why workers died."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller before it restarts the worker group."""
        # When one process is gone, the others' collectives fail: what they say of it explains nothing.
        gone = {r: e for r, e in worker_exceptions.items() if isinstance(e, WorkerHealthCheckFailedError)}
        errors = gone or worker_exceptions
        error = next(iter(errors.values()))
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        self._mailbox.died.remote(list(errors), reason.partition(_GUESSES)[0].strip())


class ControllerReporter(ControllerCallback, WorkerGroupCallback):
    """Tells the mailbox what Ray Train tells nobody: which actor controls the run, and when it ends the workers."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train's controller as it begins."""
        self._mailbox.controlled_by.remote(ray.get_runtime_context().current_actor)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Called by it before workers are asked to end."""
        self._mailbox.leave.remote()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        """Called by it before workers are ended without asking."""
        self._mailbox.leave.remote()
