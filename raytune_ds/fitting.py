"""A run on Ray Train, followed by the driver, which shows what happens and does what the workers can't."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from typing import Any, Protocol

import ray
import ray.train
from ray.train import TrainingFailedError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import remove_placement_group

from raytune_ds import early
from raytune_ds.assignment import Assignment
from raytune_ds.cluster import Scale
from raytune_ds.console import warn
from raytune_ds.downtime import Downtime
from raytune_ds.ending import Outcome
from raytune_ds.lookout import Lookout
from raytune_ds.mailbox import Event, open_mailbox
from raytune_ds.reporter import Reporter
from raytune_ds.rescue import rescue
from raytune_ds.rundir import RunDir
from raytune_ds.startup import Startup
from raytune_ds.torchgroup import NodesTorchConfig

POLL_S = 0.3
ANSWER_S = 30.0
# Of workers that do not even start. With an elastic number a group is tried every ten seconds until Ray knows that a
# node is gone; a node whose processes can't start at all has to end the run some time.
MAX_STARTS = 60
# `ray job stop` kills after three seconds what has not ended by then.
ABORT_S = 0.5


PHASES = {
    "arrived": "workers there",
    "start": "model built",
    "eval": "held-out loss measured",
    "step": "first step done",
}
"""What is done with the first event of a kind."""


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
        downtime: what restarts of the workers cost, so far.
    """

    def __init__(self, assignment: Assignment, scale: Scale, watcher: Watcher, startup: Startup) -> None:
        """Begins."""
        self.downtime = Downtime()
        self._run, self._watcher, self._startup = assignment.run, watcher, startup
        self._mailbox = open_mailbox(assignment.run.name, assignment.config.scaling)
        self._settings = early.settings(assignment.config.scaling, scale)
        callbacks = [Reporter(self._mailbox), *([Lookout()] if early.OWN_WATCHER in self._settings else [])]
        self._trainer = _trainer(assignment, scale, self._mailbox, watcher.judges, callbacks)
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
            pickled, _ = ray.get(self._mailbox.controller.remote(), timeout=ABORT_S)
            if pickled is None:
                return
            controller = ray.cloudpickle.loads(pickled)
            with contextlib.suppress(ray.exceptions.RayError):
                # An actor that has ended cannot answer: the error is the sign of success.
                ray.get(controller.abort.remote(), timeout=ABORT_S)
            ray.kill(controller)
            # Aborting takes seconds, and begins with the end of what would give them back for a dead controller.
            self._free()

    def _free(self) -> None:
        """Gives the workers' places back, which a controller that is killed can't."""
        with contextlib.suppress(ray.exceptions.RayError):
            _, places = ray.get(self._mailbox.controller.remote(), timeout=ABORT_S)
            if places is not None:
                remove_placement_group(places)

    def _fit(self) -> None:
        try:
            following = _Following(self._mailbox, self._watcher, self._run, self.downtime, self._startup)
            with early.in_environment(self._settings), self._watcher, following:
                outcome = self._trainer.fit().return_value
        except BaseException as error:
            self._free()
            self._ended.set_exception(error)
        else:
            assert isinstance(outcome, Outcome)
            self._ended.set_result(outcome)
        finally:
            self._mailbox.__ray_terminate__.remote()  # its metrics go out once more, and end with it


class _Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray's, untyped
    """With fewer processes that have to start before workers do.

    Ours read their own data, so nothing serves datasets to them. And the placement group of a run that a driver started
    is given back by the driver, or ends with it; that of an actor, of a trial that is, would outlive both without Ray
    Train's cleaner.
    """

    def _create_default_callbacks(self) -> list[Any]:
        in_an_actor = ray.get_runtime_context().get_actor_id() is not None
        unwanted = (DatasetsCallback,) if in_an_actor else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unwanted)]


def _work(assignment: Assignment, mailbox: Any, is_judged: bool) -> Outcome:
    """In a worker, which has torch; the driver needs none."""
    from raytune_ds.rayworker import worker_main

    return worker_main(assignment, mailbox, is_judged)


def _trainer(
    assignment: Assignment, scale: Scale, mailbox: Any, is_judged: bool, callbacks: list[Any]
) -> _Trainer:
    return _Trainer(
        partial(_work, assignment=assignment, mailbox=mailbox, is_judged=is_judged),
        backend_config=NodesTorchConfig(
            model=assignment.model,
            revision=assignment.base.revision,
            timeout_s=assignment.config.scaling.collective_timeout_s,
        ),
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
                controller_failure_limit=MAX_STARTS,
            ),
            callbacks=callbacks,
            worker_runtime_env=early.runtime_env(assignment.config, scale.use_gpu),
        ),
    )


class _Following:
    """Shows the mailbox's events from a thread while the run goes on."""

    def __init__(
        self, mailbox: Any, watcher: Watcher, run: RunDir, downtime: Downtime, startup: Startup
    ) -> None:
        self._mailbox, self._watcher, self._run = mailbox, watcher, run
        self._downtime, self._startup = downtime, startup
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
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warn(
                    "the run can't be followed any more, for its mailbox is gone, with the head or this node; should "
                    f"the run end, the same command resumes it ({reason})"
                )
                return
            asked = None
            try:
                self._tell(events)
            except Exception as error:  # whoever waits for a verdict must not wait for ever
                warn(f"the run ends, for what it reported could not be dealt with: {error!r}")
                self._mailbox.judge.remote(0, goes_on=False)
                self._mailbox.stop.remote()
                return

    def _tell(self, events: list[Event]) -> None:
        for kind, content, at in events:
            if kind == "hang":
                # Beside the following, for it may hang itself: on storage, or on a node.
                threading.Thread(target=self._rescue, args=(content,), daemon=True).start()
                continue
            self._watcher.show(kind, content)
            if kind in PHASES and PHASES["step"] not in self._startup.marks:
                self._startup.mark(PHASES[kind], at)
            if (restart := self._downtime.note(kind, content, at)) is not None:
                self._watcher.show("note", {"text": str(restart)})
            if kind == "eval" and self._watcher.judges:
                step = content["step"]
                self._mailbox.judge.remote(step, self._watcher.goes_on(step))

    def _rescue(self, hang: dict[str, Any]) -> None:
        warn(hang["text"])
        try:
            rescue(
                self._run,
                hang["places"],
                lambda: ray.get(self._mailbox.condemned.remote(), timeout=ANSWER_S),
                warn,
            )
        except Exception as error:  # it is tried again should they still hang later
            warn(f"nothing could be done about workers that hang: {error!r}")
