"""A config to a finished run: everything that can fail is tried before the first worker starts."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime
from typing import Any

from ray.train import TrainingFailedError

from raytune_ds import catalog, cluster, lease, storage
from raytune_ds.assignment import Assignment, harmless_changes, require_same_run
from raytune_ds.check import Checked, check
from raytune_ds.compose import dump, load, replaced
from raytune_ds.config import Config
from raytune_ds.console import human_count, human_time, say, warn
from raytune_ds.data import prepared
from raytune_ds.data.gate import require_sound
from raytune_ds.data.prepare import prepare
from raytune_ds.display import Display, shares_of_time
from raytune_ds.downtime import Restart
from raytune_ds.ending import Outcome
from raytune_ds.errors import UserError
from raytune_ds.fitting import Fitting, Watcher
from raytune_ds.naming import stem
from raytune_ds.preflight import preflight
from raytune_ds.rundir import RunDir
from raytune_ds.startup import Startup
from raytune_ds.stopping import stoppable


@dataclasses.dataclass(frozen=True)
class Result:
    """What result.json holds.

    Attributes:
        status: finished, failed, or stopped (by a signal, or because its watcher wanted no more of it).
        run: the run directory.
        wall_time_s: of this launch, from its command to its end; that of earlier launches is not in it.
        startup_s: seconds from its command to the end of each phase until the first step was done.
        progress: of a run that is not finished, that of its newest checkpoint.
        restarts: why each restart of the worker group happened and what it cost, as `downtime.Restart` says.
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
    restarts: tuple[dict[str, Any], ...]
    error: str | None = None
    startup_s: dict[str, float] = dataclasses.field(default_factory=dict)


def launch(
    config: Config, debug: bool = False, startup: Startup | None = None, where: str | None = None
) -> Result:
    """Runs a training from its config.

    Args:
        config: composed.
        debug: show Ray's and the workers' own output too.
        startup: how far it has come already.
        where: the cluster that has been joined; None: whatever is found is joined, or started, now.

    Raises:
        UserError: anything the user can mend; what was trained is in the run's checkpoints.
        TrainingFailedError: workers died more often than `scaling.max_failures`; the run can be resumed.
        Stopped: a signal came, and the run can be resumed.
    """
    startup = startup or Startup(time.monotonic())
    startup.mark("imported")
    if where is not None:
        with stoppable():
            return _launch(_checked(config, startup), where, startup)
    checked = _checked(config, startup)
    where = cluster.connect(debug)
    with stoppable():
        return _launch(checked, where, startup)


def _checked(config: Config, startup: Startup) -> Checked:
    checked = check(config)
    say("\n".join((f"model: {config.model.name}", *checked.report.lines())))
    startup.mark("checked")
    return checked


def _launch(checked: Checked, where: str, startup: Startup) -> Result:
    scale = cluster.plan_scale(checked.config.scaling, checked.config.train.global_batch)
    preflight(checked.root)
    say(f"{scale} on {where}")
    if scale.nodes_to_come:
        say(f"the cluster has to grow by {scale.nodes_to_come} node(s) for them, which takes minutes")
    assignment = assign(checked)
    startup.mark("data found")
    require_sound(assignment.store, checked.config.data.on_finding)
    with lease.held(assignment.run.driver, f"run.name = {assignment.run.name}"):
        return train(assignment, scale, startup, Display())


def train(assignment: Assignment, scale: cluster.Scale, startup: Startup, watcher: Watcher) -> Result:
    """Trains, from the newest checkpoint of the run on; Ray is there, and all that can be tried before has been.

    Args:
        assignment: of the workers.
        scale: of the workers.
        startup: how far this launch has come.
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
    resume = f"the same command with run.name={assignment.run.name} resumes it"

    def write(status: str, outcome: Outcome) -> Result:
        return _write_result(assignment, scale, startup, status, outcome, fitting.downtime.restarts)

    fitting = Fitting(assignment, scale, watcher, startup)
    try:
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
    manifest = catalog.newest_complete(run.checkpoints)
    return manifest.progress if manifest else None


def _write_result(
    assignment: Assignment,
    scale: cluster.Scale,
    startup: Startup,
    status: str,
    outcome: Outcome,
    restarts: list[Restart],
) -> Result:
    result = Result(
        status=status,
        run=assignment.run.path,
        progress=outcome.progress or {},
        wall_time_s=startup.seconds(),
        num_workers=outcome.num_workers or scale.num_workers,
        engine=outcome.engine,
        trainable_parameters=outcome.trainable,
        peak_memory_mib=tuple(round(m, 1) for m in outcome.peak_memory_mib),
        final_bytes=outcome.final_bytes,
        restarts=tuple(map(dataclasses.asdict, restarts)),
        error=outcome.error,
        startup_s=startup.marks,
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
    before = _config_before(assignment.run)
    if before is not None and catalog.steps(assignment.run.checkpoints):
        for change in harmless_changes(assignment, before):
            say(f"going on with another setting than before: {change}")
    storage.make_dir(assignment.run.path)
    storage.delete_file(assignment.run.result)
    config = replaced(assignment.config, run={"name": assignment.run.name})
    storage.write_bytes(assignment.run.config, dump(config).encode())


def _config_before(run: RunDir) -> dict[str, Any] | None:
    """As the last launch left it, with our defaults for keys that are new since; None if there is none to read."""
    if not storage.exists(run.config):
        return None
    try:
        return load(storage.read_bytes(run.config).decode()).model_dump(mode="json")
    except (UserError, UnicodeDecodeError):  # of another version, or a crash of the machine left half of it
        return None


def _finished_before(assignment: Assignment) -> Result | None:
    """The result of a run that has done all its steps.

    Raises:
        UserError: its newest checkpoint was made with other settings.
    """
    # Workers look closer; this answers at once in the usual case, and before anything of the run is changed.
    if (manifest := catalog.newest_complete(assignment.run.checkpoints)) is not None:
        require_same_run(assignment, manifest, _config_before(assignment.run))
    values = storage.read_json(assignment.run.result)
    if values is None or values["status"] != "finished" or not storage.exists(assignment.run.final):
        return None
    if values["progress"]["step"] < assignment.plan.total_steps:
        return None
    known = {field.name for field in dataclasses.fields(Result)}
    return Result(**{"engine": "ddp"} | {name: value for name, value in values.items() if name in known})


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
    say(f"of the time: {shares_of_time(progress)}")
    say(f"saved: {result.run}/final ({result.final_bytes / (1 << 20):.1f} MiB)")
    say(f"try it: raytune-ds chat --run {result.run}")


def _shown(loss: float | None) -> str:
    return "nan" if loss is None else f"{loss:.4f}"
