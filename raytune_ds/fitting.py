"""A run on Ray Train: its workers, and the way between them and the driver.

The workers tell what happens through a mailbox, an actor of this run, and hear through it what is wanted of them; the
driver shows it. Ray's own copying of every worker's output to the driver stays off, so a log holds each thing once and
in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ds.assignment import Assignment
from raytune_ds.cluster import Scale
from raytune_ds.console import warn
from raytune_ds.data.stream import stream
from raytune_ds.hooks import Orders
from raytune_ds.metrics import RunMetrics
from raytune_ds.torchgroup import NodesTorchConfig
from raytune_ds.worker import Outcome, run_worker
from raytune_ds.world import World

POLL_S = 0.3
ANSWER_S = 30.0
# `ray job stop` kills after three seconds what has not ended by then.
ABORT_S = 0.5


class Watcher(Protocol):
    """Sees a run as it goes on, and may end it."""

    @property
    def judges(self) -> bool:
        """Whether `goes_on` is asked."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: Any) -> None: ...

    def begins(self, stop: Callable[[], None]) -> None:
        """Workers are about to start; `stop` ends them, whatever they are at."""

    def show(self, kind: str, content: dict[str, Any]) -> None:
        """An event, as the workers report it."""

    def goes_on(self, step: int) -> bool:
        """Whether to train on after the evaluation of a step, whose checkpoint is written; training waits for it."""


class Fitting:
    """The run in a thread, shown as it goes, so that a signal can ask it to end in good order.

    Attributes:
        restarts: why workers died, so far.
    """

    def __init__(self, assignment: Assignment, scale: Scale, watcher: Watcher) -> None:
        """Begins."""
        self.restarts: list[str] = []
        self._mailbox, self._watcher = _mailbox(assignment.run.name), watcher
        self._trainer = _trainer(assignment, scale, self._mailbox, watcher.judges)
        self._ended: Future[Outcome] = Future()
        watcher.begins(self.kill)
        threading.Thread(target=self._fit, daemon=True).start()

    def wait(self) -> Outcome:
        """How it ended.

        Raises:
            TrainingFailedError: workers died too often.
        """
        return self._ended.result()

    def stop(self, grace_s: float) -> None:
        """Ends it with a checkpoint of its newest step if that is there in time, and otherwise all the same."""
        self._mailbox.stop.remote()
        with contextlib.suppress(TimeoutError, TrainingFailedError, ray.exceptions.RayError):
            self._ended.result(grace_s)
            return
        self.kill()

    def kill(self) -> None:
        """Ends the workers, whatever they are at; what they had not written yet is lost."""
        with contextlib.suppress(ray.exceptions.RayError):
            controller = ray.get(self._mailbox.controller.remote(), timeout=ABORT_S)
            if controller is None:
                return
            with contextlib.suppress(ray.exceptions.RayError):
                # An actor that has ended cannot answer: the error is the sign of success.
                ray.get(controller.abort.remote(), timeout=ABORT_S)
            ray.kill(controller)

    def _fit(self) -> None:
        try:
            with self._watcher, _Following(self._mailbox, self._watcher, self.restarts):
                outcome = self._trainer.fit().return_value
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            assert isinstance(outcome, Outcome)
            self._ended.set_result(outcome)
        finally:
            self._mailbox.__ray_terminate__.remote()  # its metrics go out once more, and end with it


@ray.remote(num_cpus=0)
class Mailbox:
    """Events on their way from the workers to the driver, and to Ray's metrics."""

    def __init__(self, run: str) -> None:
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._metrics = RunMetrics(run)
        self._verdicts: dict[int, asyncio.Future[bool]] = {}
        self._ended = False
        self._controller: Any = None
        self._stop = asyncio.Event()

    def put(self, kind: str, content: dict[str, Any]) -> None:
        """One more event."""
        self._events.append((kind, content))
        self._metrics.note(kind, content)

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """All events since the last time; with it the metrics are kept alive."""
        self._metrics.publish()
        events, self._events = self._events, []
        return events

    def controlled_by(self, controller: Any) -> None:
        """Which actor controls the run."""
        self._controller = controller

    def controller(self) -> Any:
        """That actor; None while there is none."""
        return self._controller

    async def verdict(self, step: int) -> bool:
        """Whether to train on after a step: for the workers, who wait for it."""
        return await self._verdict(step)

    async def judge(self, step: int, goes_on: bool) -> None:
        """The verdict. An end is one for good, should workers have been restarted meanwhile."""
        self._ended |= not goes_on
        for asked, future in {**self._verdicts, step: self._verdict(step)}.items():
            if (asked == step or self._ended) and not future.done():
                future.set_result(goes_on)

    async def stop(self) -> None:
        """The run is to stop, at the next step."""
        self._stop.set()

    async def stopped(self) -> None:
        """Comes back once it is."""
        await self._stop.wait()

    def _verdict(self, step: int) -> asyncio.Future[bool]:
        future = self._verdicts.setdefault(step, asyncio.get_running_loop().create_future())
        if self._ended and not future.done():
            future.set_result(False)
        return future


class RestartReporter(ray.train.UserCallback):
    """Tells the mailbox why workers died."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller before it restarts the worker group."""
        rank, error = next(iter(worker_exceptions.items()))
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        ranks = ", ".join(map(str, worker_exceptions))
        self._mailbox.put.remote("restart", {"text": f"worker {ranks} died: {reason}", "rank": rank})


class ControllerReporter(ControllerCallback):
    """Tells the mailbox which actor controls the run; Ray Train itself tells nobody, least of all in a thread."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train's controller as it begins."""
        self._mailbox.controlled_by.remote(ray.get_runtime_context().current_actor)


def _mailbox(run: str) -> Any:
    # On the driver's node: losing another one must not make the run go dark.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote(run)  # type: ignore[attr-defined]  # Ray adds it


def _trainer(assignment: Assignment, scale: Scale, mailbox: Any, is_judged: bool) -> TorchTrainer:
    return TorchTrainer(
        partial(_worker_main, assignment=assignment, mailbox=mailbox, is_judged=is_judged),
        torch_config=NodesTorchConfig(model=assignment.model, revision=assignment.base.revision),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(scale.fewest, scale.num_workers) if scale.fewest else scale.num_workers,
            elastic_resize_monitor_interval_s=assignment.config.scaling.resize_interval_s,
            use_gpu=scale.use_gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": 1} if scale.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # A name of its own each time: where the run stands is read from its checkpoints, not from Ray's notes.
            name=datetime.now().strftime("%Y%m%d-%H%M%S-%f"),
            storage_path=f"{assignment.run.path}/.ray",
            failure_config=ray.train.FailureConfig(
                max_failures=assignment.config.scaling.max_failures,
                max_preemption_failures=assignment.config.scaling.max_preemptions,
            ),
            callbacks=[RestartReporter(mailbox), ControllerReporter(mailbox)],
        ),
    )


def _worker_main(assignment: Assignment, mailbox: Any, is_judged: bool) -> Outcome:
    """What Ray Train runs in each worker."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL gathers objects
    world = World(context.get_world_rank(), context.get_world_size(), device)

    def report(kind: str, content: dict[str, Any]) -> None:
        if world.is_main:
            mailbox.put.remote(kind, content)
        if kind == "eval":
            ray.train.report({k: v for k, v in content.items() if isinstance(v, int | float)})

    def judge(step: int) -> bool:
        return bool(ray.get(mailbox.verdict.remote(step)))

    stopped = mailbox.stopped.remote() if world.is_main else None
    known: set[str] = set()

    def stop_asked() -> bool:
        if stopped is None or not ray.wait([stopped], timeout=0)[0]:
            return False
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(stopped)
            return True
        return False  # the driver is gone

    def is_leaving() -> bool:
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) - known if info is not None else set()
        known.update(nodes)
        return bool(nodes)

    orders = Orders(judge if is_judged else None, stop_asked, is_leaving)
    return run_worker(assignment, world, _open_stream, report, orders)


def _open_stream(store: Any, share: Any, steps: range) -> Any:
    return stream(store, "train", share, steps)


class _Following:
    """Shows the mailbox's events from a thread while the run goes on."""

    def __init__(self, mailbox: Any, watcher: Watcher, restarts: list[str]) -> None:
        self._mailbox, self._watcher, self._restarts = mailbox, watcher, restarts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        stopping, asked = False, None
        while not stopping:
            stopping = self._stop.wait(POLL_S)
            asked = asked or self._mailbox.take.remote()
            try:
                events = ray.get(asked, timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:
                continue  # what is asked for is out of the mailbox, perhaps: asking anew would lose it
            except ray.exceptions.RayError as error:
                warn(f"the progress of the run can't be shown any more: {error}")
                return
            asked = None
            try:
                self._tell(events)
            except Exception as error:  # whoever waits for a verdict must not wait for ever
                warn(f"the run ends, for what it reported could not be dealt with: {error!r}")
                self._mailbox.judge.remote(0, goes_on=False)
                self._mailbox.stop.remote()
                return

    def _tell(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        for kind, content in events:
            if kind == "restart":
                self._restarts.append(content["text"])
            self._watcher.show(kind, content)
            if kind == "eval" and self._watcher.judges:
                step = content["step"]
                self._mailbox.judge.remote(step, self._watcher.goes_on(step))
