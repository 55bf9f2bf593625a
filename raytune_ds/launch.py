"""A config to a finished run: everything that can fail is tried before the first worker starts.

The workers tell what happens through a mailbox, an actor of this run; the driver shows it. Ray's own copying of every
worker's output to the driver stays off, so a log holds each thing once and in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
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
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ds import checkpoint, cluster, lease, storage
from raytune_ds.check import Checked, check
from raytune_ds.compose import dump, replaced
from raytune_ds.config import Config
from raytune_ds.console import human_count, human_time, say, warn
from raytune_ds.data import prepared
from raytune_ds.data.prepare import prepare
from raytune_ds.data.stream import stream
from raytune_ds.display import Display
from raytune_ds.errors import UserError
from raytune_ds.metrics import RunMetrics
from raytune_ds.naming import stem
from raytune_ds.preflight import preflight
from raytune_ds.rundir import RunDir
from raytune_ds.stopping import stoppable
from raytune_ds.torchgroup import NodesTorchConfig
from raytune_ds.worker import Assignment, Orders, Outcome, require_same_run, run_worker
from raytune_ds.world import World

POLL_S = 0.3
# `ray job stop` kills after three seconds what has not ended by then.
ABORT_S = 0.5


@dataclasses.dataclass(frozen=True)
class Result:
    """What result.json holds.

    Attributes:
        status: finished, failed, or stopped (by a signal, or because its watcher wanted no more of it).
        run: the run directory.
        wall_time_s: of this launch, from its first check to its end; that of earlier launches is not in it.
        progress: of a run that is not finished, that of its newest checkpoint.
        restarts: why each restart of the worker group happened.
    """

    status: str
    run: str
    progress: dict[str, Any]
    wall_time_s: float
    num_workers: int
    engine: str
    trainable_parameters: int
    peak_memory_mib: tuple[float, ...]
    final_bytes: int
    restarts: tuple[str, ...]
    error: str | None = None


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


def launch(config: Config, debug: bool = False) -> Result:
    """Runs a training from its config.

    Args:
        config: composed.
        debug: show Ray's and the workers' own output too.

    Raises:
        UserError: anything the user can mend; what was trained is in the run's checkpoints.
        TrainingFailedError: workers died more often than `scaling.max_failures`; the run can be resumed.
        Stopped: a signal came, and the run can be resumed.
    """
    started = time.monotonic()
    checked = check(config)
    say("\n".join((f"model: {config.model.name}", *checked.report.lines())))
    where = cluster.connect(debug)
    with stoppable():
        return _launch(checked, where, started)


def _launch(checked: Checked, where: str, started: float) -> Result:
    scale = cluster.plan_scale(checked.config.scaling, checked.config.train.global_batch)
    preflight(checked.root)
    say(f"{scale} on {where}")
    if scale.nodes_to_come:
        say(f"the cluster has to grow by {scale.nodes_to_come} node(s) for them, which takes minutes")
    assignment = assign(checked)
    with lease.held(assignment.run.driver, f"run.name = {assignment.run.name}"):
        return train(assignment, scale, started, Display())


def train(assignment: Assignment, scale: cluster.Scale, started: float, watcher: Watcher) -> Result:
    """Trains, from the newest checkpoint of the run on; Ray is there, and all that can be tried before has been.

    Args:
        assignment: of the workers.
        scale: of the workers.
        started: when this launch began, by time.monotonic.
        watcher: sees it.

    Raises:
        UserError, TrainingFailedError, Stopped: see launch.
    """
    if (done := _finished_before(assignment)) is not None:
        say(f"run: {assignment.run.path} is finished already; raise train.num_train_epochs to continue it")
        return done
    _claim(assignment)
    say(f"run: {assignment.run.path}")
    if assignment.base.revision is not None:
        say(
            f"model: {assignment.model.name} is fetched to each node that has not got it yet, before training starts"
        )
    restarts: list[str] = []
    resume = f"the same command with run.name={assignment.run.name} resumes it"

    def write(status: str, outcome: Outcome) -> Result:
        return _write_result(assignment, scale, started, status, outcome, restarts)

    mailbox = _mailbox(assignment.run.name)
    trainer = _trainer(assignment, scale, mailbox, watcher.judges)
    fitting = _Fitting(trainer, mailbox, restarts, watcher)
    try:
        watcher.begins(trainer.stop)
        outcome = fitting.wait()
    except KeyboardInterrupt:
        fitting.stop(assignment.config.scaling.stop_grace_s)
        progress = _newest_progress(assignment.run)
        write("stopped", Outcome(progress=progress))
        after = f"after the checkpoint of step {progress['step']}" if progress else "from its beginning"
        warn(f"the run was stopped; {resume} {after}")
        raise
    except TrainingFailedError as error:
        if isinstance(mistake := getattr(error, "controller_failure", None), UserError):
            raise mistake from error
        write("failed", Outcome(error=str(error), progress=_newest_progress(assignment.run)))
        warn(f"the run failed; its checkpoints stay, and {resume}")
        raise
    if outcome.error is not None:
        write("failed", dataclasses.replace(outcome, progress=_newest_progress(assignment.run)))
        raise UserError(outcome.error)
    result = write("stopped" if outcome.stopped else "finished", outcome)
    _say_end(result)
    return result


def _newest_progress(run: RunDir) -> dict[str, Any] | None:
    """What a run had counted at its newest complete checkpoint; None if there is none."""
    manifest = checkpoint.newest_complete(run.checkpoints)
    return manifest.progress if manifest else None


def _write_result(
    assignment: Assignment,
    scale: cluster.Scale,
    started: float,
    status: str,
    outcome: Outcome,
    restarts: list[str],
) -> Result:
    result = Result(
        status=status,
        run=assignment.run.path,
        progress=outcome.progress or {},
        wall_time_s=round(time.monotonic() - started, 2),
        num_workers=outcome.num_workers or scale.num_workers,
        engine=outcome.engine,
        trainable_parameters=outcome.trainable,
        peak_memory_mib=tuple(round(m, 1) for m in outcome.peak_memory_mib),
        final_bytes=outcome.final_bytes,
        restarts=tuple(restarts),
        error=outcome.error,
    )
    storage.write_json(assignment.run.result, dataclasses.asdict(result))
    return result


def assign(checked: Checked, run: RunDir | None = None, lineage: str | None = None) -> Assignment:
    """Prepares the data: what a worker is told. Ray is needed.

    Args:
        checked: the config.
        run: its directory, if it is not the usual one.
        lineage: where its settings, or its first steps, come from.

    Raises:
        UserError: a row is bad, or nothing is left to train on.
    """
    config, root = checked.config, checked.root
    store = prepare(config, checked.inputs, checked.tokenizer, f"{root}/{prepared.FOLDER}")
    run = run or RunDir(f"{root}/{config.run.name or _make_name(config)}")
    return Assignment(
        config, checked.model, checked.base, checked.tokenizer, store, run, checked.ds_config, lineage
    )


def _make_name(config: Config) -> str:
    return f"{stem(config)}-{datetime.now():%Y%m%d-%H%M%S}"


def _claim(assignment: Assignment) -> None:
    """Makes the run directory; where it is there, its config becomes the one that the run continues with.

    How it ended the last time is no longer true.
    """
    storage.make_dir(assignment.run.path)
    storage.delete_file(assignment.run.result)
    config = replaced(assignment.config, run={"name": assignment.run.name})
    storage.write_bytes(assignment.run.config, dump(config).encode())


def _finished_before(assignment: Assignment) -> Result | None:
    """The result of a run that has done all its steps.

    Raises:
        UserError: its newest checkpoint was made with other settings.
    """
    root = assignment.run.checkpoints
    if steps := checkpoint.steps(root):
        with contextlib.suppress(checkpoint.CheckpointError):
            # Workers look closer; this answers at once in the usual case.
            require_same_run(assignment, checkpoint.read_manifest(checkpoint.directory(root, steps[-1])))
    values = storage.read_json(assignment.run.result)
    if values is None or values["status"] != "finished" or not storage.exists(assignment.run.final):
        return None
    if values["progress"]["step"] < assignment.plan.total_steps:
        return None
    known = {field.name for field in dataclasses.fields(Result)}
    return Result(**{"engine": "ddp"} | {name: value for name, value in values.items() if name in known})


# ---------------------------------------------------------------------------------------------- the workers


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


class Trainer(ray.train.torch.TorchTrainer):
    """A TorchTrainer that leaves signals to us: Ray's own answer to Ctrl-C ends the process as if all were well."""

    mailbox: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Ends the workers, whatever they are at; what they had not written yet is lost."""
        with contextlib.suppress(ray.exceptions.RayError):
            controller = ray.get(self.mailbox.controller.remote(), timeout=ABORT_S)
            if controller is None:
                return
            with contextlib.suppress(ray.exceptions.RayError):
                # An actor that has ended cannot answer: the error is the sign of success.
                ray.get(controller.abort.remote(), timeout=ABORT_S)
            ray.kill(controller)


def _mailbox(run: str) -> Any:
    # On the driver's node: losing another one must not make the run go dark.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote(run)  # type: ignore[attr-defined]  # Ray adds it


def _trainer(assignment: Assignment, scale: cluster.Scale, mailbox: Any, is_judged: bool) -> Trainer:
    trainer = Trainer(
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
    trainer.mailbox = mailbox
    return trainer


class _Fitting:
    """The run in a thread, shown as it goes, so that a signal can ask it to end in good order."""

    def __init__(self, trainer: Trainer, mailbox: Any, restarts: list[str], watcher: Watcher) -> None:
        """Why workers died is added to `restarts`."""
        self._trainer, self._mailbox, self._restarts, self._watcher = trainer, mailbox, restarts, watcher
        self._ended: Future[Outcome] = Future()
        threading.Thread(target=self._fit, daemon=True).start()

    def wait(self) -> Outcome:
        """How it ended.

        Raises:
            TrainingFailedError: see launch.
        """
        return self._ended.result()

    def stop(self, grace_s: float) -> None:
        """Ends it with a checkpoint of its newest step if that is there in time, and otherwise all the same."""
        self._mailbox.stop.remote()
        with contextlib.suppress(TimeoutError, TrainingFailedError, ray.exceptions.RayError):
            self._ended.result(grace_s)
            return
        self._trainer.stop()

    def _fit(self) -> None:
        try:
            with self._watcher, _Following(self._mailbox, self._watcher, self._restarts):
                outcome = self._trainer.fit().return_value
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            assert isinstance(outcome, Outcome)
            self._ended.set_result(outcome)
        finally:
            self._mailbox.__ray_terminate__.remote()  # its metrics go out once more, and end with it


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
        stopping = False
        while not stopping:
            stopping = self._stop.wait(POLL_S)
            try:
                events = ray.get(self._mailbox.take.remote(), timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError as error:
                warn(f"the progress of the run can't be shown any more: {error}")
                return
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


def _say_end(result: Result) -> None:
    progress = result.progress
    if result.status == "stopped":
        say(f"stopped after step {progress['step']}, of which there is a checkpoint")
        return
    losses = f"loss {_shown(progress['first_loss'])} -> {_shown(progress['last_loss'])}"
    if progress["last_eval_loss"] is not None:
        losses += f", held-out {_shown(progress['first_eval_loss'])} -> {_shown(progress['last_eval_loss'])}"
    seconds = progress["seconds"] + progress["checkpoint_wait_s"]
    say(
        f"finished: {progress['step']} steps, {human_count(progress['tokens'])} tokens in {human_time(seconds)} of "
        f"training ({human_time(result.wall_time_s)} since the start); {losses}; peak memory "
        f"{max(result.peak_memory_mib):,.0f} MiB a worker"
    )
    say(f"saved: {result.run}/final ({result.final_bytes / (1 << 20):.1f} MiB)")
    say(f"try it: raytune-ds chat --run {result.run}")


def _shown(loss: float | None) -> str:
    return "nan" if loss is None else f"{loss:.4f}"
