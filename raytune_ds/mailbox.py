"""Between the workers of a run and its driver: what happens, what is wanted, and whether everybody lives.

Ray's own copying of every worker's output to the driver stays off, so a log holds each thing once and in order.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ds.config import ScalingConfig
from raytune_ds.metrics import RunMetrics
from raytune_ds.stacks import Place
from raytune_ds.watch import Beat, Watch

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
        self._group: dict[int, tuple[str, int]] = {}
        self._places: dict[int, Place] = {}
        self._verdicts: dict[int, asyncio.Future[bool]] = {}
        self._ended = False
        self._controller: bytes | None = None
        self._places_held: Any = None
        self._stop = asyncio.Event()

    # ----------------------------------------------------------------------------------- from the workers

    def put(self, kind: str, content: dict[str, Any]) -> None:
        """One more event."""
        self._events.append((kind, content, time.monotonic()))
        self._metrics.note(kind, content)

    def beat(self, beat: Beat, place: Place) -> None:
        """A worker's sign of life, and how to get at its process."""
        if self._group.get(beat.rank) == (place.node, place.pid):  # not of a group that is no more
            self._watch.note(beat, time.monotonic())
            self._places[beat.rank] = place

    def leaves(self, rank: int) -> None:
        """A worker has done all that it was to do."""
        self._watch.leaves(rank)

    async def verdict(self, step: int) -> bool:
        """Whether to train on after a step: for the workers, who wait for it."""
        return await self._verdict(step)

    async def stopped(self) -> None:
        """Comes back once the run is to stop."""
        await self._stop.wait()

    # -------------------------------------------------------------------------------- from the controller

    def controlled_by(self, controller: bytes) -> None:
        """Which actor controls the run: pickled, for to unpickle it here would import all of Ray Train."""
        self._controller = controller

    def held(self, places: Any) -> None:
        """The placement group that new workers are in."""
        self._places_held = places

    def group(self, group: dict[int, tuple[str, int]]) -> None:
        """New workers begin: node and process of each rank."""
        self._group, self._places = group, {}
        self._watch.begin(group, time.monotonic())

    def restart(self, ranks: list[int], error: str) -> None:
        """The workers are restarted, for some of them died, or, if none did, for another reason."""
        died = f"worker {', '.join(map(str, ranks))} died: {error}" if ranks else error
        why = self._watch.explain(died, ranks, time.monotonic())
        self.put("restart", {"text": why, "rank": min(ranks, default=0)})
        self._watch.end()

    def leave(self) -> None:
        """The workers are about to be shut down."""
        self._watch.end()

    # ------------------------------------------------------------------------------------ from the driver

    def take(self) -> list[Event]:
        """All events since the last time; with it the metrics are kept alive."""
        self._metrics.publish()
        if (hang := self._watch.look(time.monotonic())) is not None:
            self.put("hang", {"text": hang.text, "places": dict(self._places)})
        events, self._events = self._events, []
        return events

    def condemned(self) -> tuple[int, ...]:
        """The ranks that hold up the others, as of now, and are about to be ended."""
        return self._watch.condemn(time.monotonic())

    def controller(self) -> tuple[bytes | None, Any]:
        """The actor that controls the run, pickled, and the workers' placement group; None while there is none."""
        return self._controller, self._places_held

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
