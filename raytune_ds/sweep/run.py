"""A sweep from its config to its leaderboard."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import ray
from ray import tune

from raytune_ds import cluster, lease, storage
from raytune_ds.check import Checked, check, vary
from raytune_ds.compose import differences, dump, load, replaced
from raytune_ds.config import Config
from raytune_ds.console import human_count, human_time, say, warn
from raytune_ds.errors import UserError
from raytune_ds.launch import assign
from raytune_ds.naming import DECIDES_NOTHING, lasting_name
from raytune_ds.preflight import preflight
from raytune_ds.stopping import stoppable
from raytune_ds.sweep import leaderboard
from raytune_ds.sweep.board import SweepDisplay, board
from raytune_ds.sweep.course import Course
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.outcome import write_outcome
from raytune_ds.sweep.records import Goal, Trial
from raytune_ds.sweep.schedule import SCHEDULERS, Endings, Recorded
from raytune_ds.sweep.search import SEARCHERS, Random, Replayed, drawn
from raytune_ds.sweep.space import Space, check_space, num_trials, trial_base
from raytune_ds.sweep.sweepdir import SweepDir
from raytune_ds.sweep.trainable import Job, trainable
from raytune_ds.sweepconfig import PAUSING, POPULATION
from raytune_ds.tracking import grouped

# Ray Tune's own files, messages and signal handler, in place of which there are ours.
_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# What a sweep may go on with another value of.
_MAY_CHANGE = (
    *DECIDES_NOTHING,
    "sweep.trials",
    "sweep.budget.",
    "sweep.max_concurrent",
    "sweep.give_up_after",
)


@dataclass(frozen=True)
class Swept:
    """A sweep that has come to its end.

    Attributes:
        sweep: its directory.
        trials: as they ended.
        best: of them.
        goal: of the search.
    """

    sweep: SweepDir
    trials: list[Trial]
    best: Trial
    goal: Goal


def sweep(config: Config, debug: bool = False) -> Swept:
    """Runs a sweep, or goes on with it.

    Args:
        config: composed.
        debug: show what Ray and the trials say, too.

    Raises:
        UserError: anything the user can mend; what is done stays.
        Stopped: a signal came; the same command goes on.
    """
    config = replaced(config, run={"name": config.run.name or sweep_name(config)})
    space = check_space(config)
    # Whether a directory of that name may be there is another question for a sweep than for a run.
    checked = check(replaced(trial_base(config), run={"name": None}))
    directory = SweepDir(f"{checked.root}/{config.run.name}")
    _check_place(config, directory)
    say("\n".join((f"model: {config.model.name}", *checked.report.lines())))
    _check_values(checked, space)
    where = cluster.connect(debug)
    with stoppable():
        return _sweep(config, checked, space, directory, where)


def sweep_name(config: Config) -> str:
    """A name that the same command always gives, so that it goes on with the same sweep."""
    return f"{lasting_name(config, but_for=_MAY_CHANGE)}-sweep"


def _check_place(config: Config, directory: SweepDir) -> None:
    """Whether the directory may be used: it is new, or the same sweep's, and as `run.resume` says.

    Raises:
        UserError: it may not.
    """
    name = f"run.name = {directory.name}: {directory.path}"
    if not set(storage.list_names(directory.path)) - {"driver.json"}:
        if config.run.resume == "must":
            raise UserError(f"{name} is not there to go on with, and run.resume is must.")
        return
    if not storage.exists(directory.config):
        raise UserError(f"{name} is there but is no sweep; choose another name.")
    if config.run.resume == "never":
        raise UserError(f"{name} is there already, and run.resume is never.")
    then = load(storage.read_bytes(directory.config).decode())
    changed = [
        f"  {key}: {a} then, {b} now"
        for key, (a, b) in differences(then, config).items()
        if not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"run.name = {directory.name}: this sweep was begun with other settings:\n"
            + "\n".join(changed)
            + "\nSet them back to go on with it, or choose another run.name to start anew."
        )


def _check_values(checked: Checked, space: Space) -> None:
    """Tries each value of each key against the model and the data.

    Raises:
        UserError: all that is wrong.
    """
    problems = []
    for key, values in space.corners():
        try:
            vary(checked, space.applied(checked.config, values))
        except UserError as error:
            problems.append(f"sweep.space: {key} = {values[key]}: {error}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _sweep(config: Config, checked: Checked, space: Space, directory: SweepDir, where: str) -> Swept:
    goal = Goal(config.sweep.metric, config.sweep.modes)
    total = num_trials(config, space)
    concurrent, each = _concurrency(checked, space)
    preflight(checked.root)
    assignment = assign(checked)
    if assignment.store.manifest.eval.num_packs == 0:
        raise UserError(
            "sweep: there are no held-out data, and a trial reports when it is evaluated. Set data.eval.fraction above "
            "0, or name data.eval.sources."
        )
    steps = assignment.plan.total_steps
    with lease.held(directory.driver, f"run.name = {directory.name}"):
        journal = _begin(config, directory)
        say(f"sweep: {directory.path}")
        say(
            f"{total} trials over {', '.join(space.keys)}; {concurrent} at a time on {where}, {each} worker(s) each; "
            f"{steps} steps and up to {min(config.sweep.reports, steps)} reports a trial"
        )
        if journal.trials:
            ended = sum(trial.status != "running" for trial in journal.trials)
            say(f"going on: {ended} trials have ended, {len(journal.trials) - ended} are resumed")
        files = (directory.leaderboard, directory.best, directory.report)
        with grouped(directory.path, config.tracking.to, config.model_dump(mode="json"), files, warn):
            course = _search(checked, space, goal, directory, journal, total, concurrent)
            return _end(config, checked, directory, journal, goal, course)


def _search(
    checked: Checked,
    space: Space,
    goal: Goal,
    directory: SweepDir,
    journal: Journal,
    total: int,
    concurrent: int,
) -> Course:
    """Runs trials until there are no more to run."""
    seen = board()
    display = SweepDisplay(seen, goal, journal.trials, total)
    course = Course(checked.config, space, goal, journal, display, concurrent)
    job = Job(checked, space, directory, seen, _environment())
    try:
        if not course.is_done(total):
            with display:
                _tuner(job, course, journal, goal, total).fit()
    except KeyboardInterrupt:
        warn(f"the sweep was stopped; the same command with run.name={directory.name} goes on with it")
        raise
    finally:
        ray.kill(seen)
        _tidy(directory)
    return course


def _begin(config: Config, directory: SweepDir) -> Journal:
    """The journal of a sweep that begins, or goes on."""
    storage.write_bytes(directory.config, dump(config).encode())
    journal = Journal(directory.journal)
    journal.launch()
    return journal


def _concurrency(checked: Checked, space: Space) -> tuple[int, int]:
    """How many trials run at once, and the most workers that one of them has.

    Raises:
        UserError: one of the trials could never be placed.
    """
    scales = []
    for _, values in space.corners():
        config = space.applied(checked.config, values)
        scales.append(cluster.plan_scale(config.scaling, config.train.global_batch))
    largest = max(scales, key=lambda scale: scale.num_workers * scale.cpus_per_worker)
    fits = max(1, largest.room // largest.num_workers)
    wanted = checked.config.sweep.max_concurrent
    return (fits if wanted == "auto" else min(fits, wanted)), largest.num_workers


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in (cluster.MAY_GROW,) if name in os.environ}


def _tuner(job: Job, course: Course, journal: Journal, goal: Goal, total: int) -> Any:
    config, space = job.base.config, job.space
    seed = config.run.seed
    scheduler = config.sweep.scheduler.kind
    os.environ |= _TUNE
    pauses = scheduler in PAUSING
    search: dict[str, Any] = {}
    search_alg = None
    if scheduler in POPULATION:
        # Their population is drawn at once, and these schedulers take no searcher.
        draw = Random(space, seed)
        population = [drawn(space, draw.suggest(str(number + 1))) for number in range(total)]
        search["param_space"] = {"values": tune.grid_search(population)}
    else:
        suggester = SEARCHERS[config.sweep.searcher.kind](space, goal, config.sweep.searcher, seed)
        # A paused trial waits for all of its bracket to be there.
        search_alg = Replayed(
            suggester, space, journal, lambda: pauses or course.has_room, lambda: course.is_over
        )
    return tune.Tuner(
        trainable(job, _share_of_memory(course.most_running) if pauses else 1),
        **search,
        tune_config=tune.TuneConfig(
            search_alg=search_alg,
            num_samples=total if search_alg else 1,
            scheduler=Recorded(SCHEDULERS[scheduler](config.sweep, goal, space), course),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            # Where the sweep stands is read from its journal, not from Ray Tune's notes.
            name=datetime.now().strftime("%Y%m%d-%H%M%S-%f"),
            storage_path=job.sweep.tune,
            failure_config=tune.FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[Endings(course)],
            verbose=0,
        ),
    )


def _share_of_memory(num_trials: int) -> int:
    """Bytes of memory that a trial's actor asks for, so that no more than twice so many are there at once.

    Schedulers that pause trials have more of them than there is room for, and Ray Tune would start an actor for each.
    Half of what would just fit, for others may use the cluster, too.
    """
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    share = max(nodes)
    while sum(memory // share for memory in nodes) < num_trials:
        share = share * 9 // 10
    return max(1, share // 2)


def _tidy(directory: SweepDir) -> None:
    with contextlib.suppress(OSError):
        storage.delete_dir(directory.tune)


def _end(
    config: Config,
    checked: Checked,
    directory: SweepDir,
    journal: Journal,
    goal: Goal,
    course: Course,
) -> Swept:
    """Writes what comes out.

    Raises:
        UserError: nothing does, because all trials failed.
    """
    trials = journal.trials
    best = goal.best(trials)
    if best is None:
        raise UserError(_all_failed(trials, directory))
    write_outcome(config, checked.config, directory, trials, goal, best, course)
    leaderboard.show(trials, goal)
    spent = f"; {course.spent}" if course.spent else ""
    say(
        f"{len(trials)} trials, {human_count(course.tokens)} tokens, {human_time(course.hours * 3600)}{spent}"
    )
    say(f"leaderboard: {directory.leaderboard}\nreport: {directory.report}")
    say(f"the best one, {best.name}, as a config: python -m raytune_ds.train --config {directory.best}")
    return Swept(directory, trials, best, goal)


def _all_failed(trials: list[Trial], directory: SweepDir) -> str:
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        reasons.setdefault(trial.reason or "no report", []).append(trial.name)
    lines = [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(
        (
            f"all {len(trials)} trials failed:",
            *lines,
            f"Their run directories are in {directory.path}/trials. Mend it, and choose another run.name.",
        )
    )
