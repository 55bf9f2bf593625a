"""The best trial of a sweep, trained to the end."""

from __future__ import annotations

import time

from raytune_ds import catalog, cluster, lease
from raytune_ds.assignment import Assignment
from raytune_ds.check import check
from raytune_ds.compose import replaced
from raytune_ds.config import Config
from raytune_ds.console import say
from raytune_ds.display import Display
from raytune_ds.errors import UserError
from raytune_ds.launch import Result, assign, train
from raytune_ds.rundir import RunDir
from raytune_ds.startup import Startup
from raytune_ds.stopping import stoppable
from raytune_ds.sweep.fork import fork, hindrances
from raytune_ds.sweep.outcome import full_config
from raytune_ds.sweep.run import Swept


def promote(config: Config, swept: Swept, anew: bool) -> Result:
    """Trains the best trial with the whole budget and all the data of the sweep's config, into `promoted/`.

    Args:
        config: of the sweep.
        swept: that has ended.
        anew: from the start, and not from the trial's checkpoint.

    Raises:
        UserError: the settings of `sweep.trial` do not let the trial go on, or what launch raises.
    """
    startup = Startup(time.monotonic())
    best, run = swept.best, swept.sweep.promoted(swept.best.number, anew)
    name = f"{swept.sweep.name}-promoted-{run.name}"[-128:].lstrip(".")
    full = replaced(full_config(config, best), run={"name": name, "resume": "auto"})
    say(f"\npromoting trial {best.name}", style="bold")
    checked = check(full)
    with stoppable():
        scale = cluster.plan_scale(checked.config.scaling, checked.config.train.global_batch)
        assignment = assign(checked, run, _lineage(swept, anew))
        with lease.held(run.driver, run.path):
            if not anew:
                _begin_with(RunDir(best.run), best.name, assignment)
            return train(assignment, scale, startup, Display())


def _lineage(swept: Swept, anew: bool) -> str:
    best, metric = swept.best, swept.goal.metrics[0]
    assert best.last is not None
    begun = "from the start" if anew else f"from its checkpoint of step {best.last.step}"
    return (
        f"the best of {len(swept.trials)} trials of the sweep {swept.sweep.name}: trial {best.name}, {metric} "
        f"{best.value(metric):.4f} at step {best.last.step}; trained on {begun}"
    )


def _begin_with(trial: RunDir, name: str, assignment: Assignment) -> None:
    """Copies the trial's newest checkpoint, unless the promoted run has one already.

    Raises:
        UserError: there is none, or its run could not have led to this one.
    """
    manifest = catalog.newest_complete(trial.checkpoints)
    if manifest is None:
        raise UserError(
            f"{trial.path} has no checkpoint to go on from; --promote anew trains it from the start."
        )
    if wrong := hindrances(manifest.identity, assignment.identity):
        raise UserError(
            f"trial {name} can't be continued, for sweep.trial gave it other settings:\n  "
            + "\n  ".join(wrong)
            + "\n--promote anew trains it from the start with those of the config."
        )
    if manifest.step > assignment.plan.total_steps:
        raise UserError(
            f"trial {name} has done {manifest.step} steps, more than the {assignment.plan.total_steps} of the config; "
            "raise train.num_train_epochs or train.max_steps."
        )
    if catalog.newest_complete(assignment.run.checkpoints) is None:
        say(f"from its checkpoint of step {manifest.step}; {assignment.plan.total_steps} steps in all")
    fork(trial, manifest.step, assignment.run, assignment.identity)
