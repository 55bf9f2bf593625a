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
from raytune_ds.config import Config, ScalingConfig
from raytune_ds.console import human_count, human_time, say, warn
from raytune_ds.data.gate import require_sound
from raytune_ds.errors import UserError
from raytune_ds.launch import assign
from raytune_ds.naming import DECIDES_NOTHING, lasting_name
from raytune_ds.preflight import preflight
from raytune_ds.stopping import stoppable
from raytune_ds.sweep import leaderboard
from raytune_ds.sweep.attempt import report_every
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
MOST_FAILURES = 100
ACTOR_BYTES = 768 << 20
"""Of the process that looks after a trial, with all libraries imported."""

Scales = dict[tuple[ScalingConfig, int], cluster.Scale]
"""What trials ask for, by what decides it: the scaling section and the global batch."""


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
    # Ray's own cleaners of what a process leaves behind that was killed ask its dashboard.
    where = cluster.connect(debug, dashboard=True)
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
    # Whom a trial is compared with, or copied from, follows from how many there are.
    pauses = config.sweep.scheduler.kind in PAUSING
    then = load(storage.read_bytes(directory.config).decode())
    changed = [
        f"  {key}: {a} then, {b} now"
        for key, (a, b) in differences(then, config).items()
        if not key.startswith(_MAY_CHANGE) or (key == "sweep.trials" and pauses)
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


@dataclass(frozen=True)
class _Plan:
    """What a sweep will do.

    Attributes:
        goal: of the search.
        total: trials at most.
        scales: what trials ask for, by what decides it.
        concurrent: trials at once.
        reports: that a trial makes.
    """

    goal: Goal
    total: int
    scales: Scales
    concurrent: int
    reports: int


def _sweep(config: Config, checked: Checked, space: Space, directory: SweepDir, where: str) -> Swept:
    scales = _scales(checked, space)
    largest = max(scales.values(), key=lambda scale: scale.num_workers * scale.cpus_per_worker)
    preflight(checked.root)
    assignment = assign(checked)
    require_sound(assignment.store, checked.config.data.on_finding)
    if assignment.store.manifest.eval.num_packs == 0:
        raise UserError(
            "sweep: there are no held-out data, and a trial reports when it is evaluated. Set data.eval.fraction above "
            "0, or name data.eval.sources."
        )
    steps = assignment.plan.total_steps
    with lease.held(directory.driver, f"run.name = {directory.name}"):
        journal = _begin(config, directory)
        plan = _Plan(
            goal=Goal(config.sweep.metric, config.sweep.modes),
            total=max(num_trials(config, space), len(journal.trials)),
            scales=scales,
            concurrent=_concurrent(config, scales, largest),
            reports=-(-steps // report_every(checked.config, steps)),
        )
        say(f"sweep: {directory.path}")
        say(
            f"{plan.total} trials over {', '.join(space.keys)}; {plan.concurrent} at a time on {where}, "
            f"each on {largest}; {steps} steps and up to {plan.reports} reports a trial"
        )
        files = (directory.leaderboard, directory.best, directory.report)
        with grouped(directory.path, config.tracking.to, config.model_dump(mode="json"), files, warn):
            course = _search(checked, space, directory, journal, plan)
            return _end(config, checked, directory, journal, plan.goal, course)


def _search(checked: Checked, space: Space, directory: SweepDir, journal: Journal, plan: _Plan) -> Course:
    """Runs trials until there are no more to run."""
    seen = board()
    display = SweepDisplay(seen, plan.goal, journal.trials, plan.total)
    course = Course(checked.config, space, plan.goal, journal, display, plan.concurrent)
    course.go_on()
    if journal.trials:
        ended = sum(trial.status != "running" for trial in journal.trials)
        say(f"going on: {ended} trials have ended, {len(journal.trials) - ended} are resumed")
    job = Job(checked, space, directory, seen, _environment(), plan.scales)
    try:
        if not course.is_done(plan.total):
            with display:
                _tuner(job, course, journal, plan).fit()
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


def _scales(checked: Checked, space: Space) -> Scales:
    """What trials ask for, by what decides it.

    Raises:
        UserError: one of the trials could never be placed.
    """
    scales: Scales = {}
    for _, values in space.corners():
        config = space.applied(checked.config, values)
        key = (config.scaling, config.train.global_batch)
        if key not in scales:
            scales[key] = cluster.plan_scale(*key)
    return scales


def _concurrent(config: Config, scales: Scales, largest: cluster.Scale) -> int:
    """How many trials run at once, whichever they are."""
    fits = max(1, min(scale.room for scale in scales.values()) // largest.num_workers)
    wanted = config.sweep.max_concurrent
    return fits if wanted == "auto" else min(fits, wanted)


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in (cluster.MAY_GROW,) if name in os.environ}


def _tuner(job: Job, course: Course, journal: Journal, plan: _Plan) -> Any:
    config, space, total = job.base.config, job.space, plan.total
    seed, section = config.run.seed, config.sweep.model_copy(update={"reports": plan.reports})
    scheduler = section.scheduler.kind
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
        suggester = SEARCHERS[section.searcher.kind](space, plan.goal, section.searcher, seed)
        # A paused trial waits for all of its bracket to be there.
        search_alg = Replayed(
            suggester, space, journal, lambda: pauses or course.has_room, lambda: course.is_over
        )
    return tune.Tuner(
        trainable(job, _memory(plan.concurrent, pauses)),
        **search,
        tune_config=tune.TuneConfig(
            search_alg=search_alg,
            num_samples=total if search_alg else 1,
            scheduler=Recorded(SCHEDULERS[scheduler](section, plan.goal, space), course),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            # Where the sweep stands is read from its journal, not from Ray Tune's notes.
            name=datetime.now().strftime("%Y%m%d-%H%M%S-%f"),
            storage_path=job.sweep.tune,
            failure_config=tune.FailureConfig(
                # Without a limit, one that always breaks would never end.
                max_failures=MOST_FAILURES if config.scaling.max_failures < 0 else config.scaling.max_failures
            ),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[Endings(course)],
            verbose=0,
        ),
    )


def _memory(num_trials: int, pauses: bool) -> int:
    """Bytes of memory that a trial's actor asks for: about what it takes, so that no node gets too many of them.

    Schedulers that pause trials have more of them than there is room for, and Ray Tune would start an actor for each:
    there they ask for so much that no more than twice as many are there at once.

    Raises:
        UserError: no node has any.
    """
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    share = max(nodes)
    if share < num_trials:
        raise UserError("sweep: no node of the Ray cluster has memory to give; start one without --memory=0.")
    while sum(memory // share for memory in nodes) < num_trials:
        share = share * 9 // 10
    # Half of what would just fit, for others may use the cluster, too.
    share = max(1, share // 2)
    return share if pauses else min(share, ACTOR_BYTES)


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
