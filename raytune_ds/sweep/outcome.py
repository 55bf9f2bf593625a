"""What a sweep leaves behind: a leaderboard, the best config and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raytune_ds import storage
from raytune_ds.compose import differences, overridden
from raytune_ds.config import Config
from raytune_ds.console import human_count
from raytune_ds.sweep.course import Course
from raytune_ds.sweep.leaderboard import write_csv
from raytune_ds.sweep.records import Goal, Trial
from raytune_ds.sweep.report import write_report
from raytune_ds.sweep.sweepdir import SweepDir


def write_outcome(
    config: Config,
    base: Config,
    directory: SweepDir,
    trials: list[Trial],
    goal: Goal,
    best: Trial,
    course: Course,
) -> None:
    """Writes all of it.

    Args:
        config: of the sweep.
        base: of its trials, the data named.
        directory: of the sweep.
        trials: as they ended.
        goal: of the search.
        best: of them.
        course: knows what it cost.
    """
    write_csv(directory.leaderboard, trials, goal)
    storage.write_bytes(
        directory.best, best_recipe(full_config(config, best), directory, goal, best).encode()
    )
    facts = _facts(config, base, directory, course)
    write_report(directory.report, trials, goal, facts, course.price_per_trial_hour)


def full_config(config: Config, best: Trial) -> Config:
    """The config that the best trial's values make of the sweep's: its full budget, and no sweep."""
    return overridden(
        config,
        {**best.values, "run.name": None, "sweep": Config().sweep.model_dump(mode="json")},
        "best trial",
    )


def best_recipe(config: Config, directory: SweepDir, goal: Goal, best: Trial) -> str:
    """A config file for `raytune_ds.train` with what differs from the defaults."""
    metric = goal.metrics[0]
    tree: dict[str, Any] = {}
    for key, (_, value) in differences(Config(), config).items():
        if not key.startswith("cluster."):
            _put(tree, key, value)
    head = (
        f"# The best of the sweep {directory.name}: trial {best.name}, {metric} {best.value(metric):.6g}.",
        "#",
        f"#   python -m raytune_ds.train --config {directory.best} run.name=my-run",
    )
    return "\n".join(head) + "\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _facts(config: Config, base: Config, directory: SweepDir, course: Course) -> Mapping[str, str]:
    section = config.sweep
    sources = ", ".join(Path(source.path).name for source in base.data.sources or ())
    facts = {
        "sweep": directory.name,
        "model": config.model.name,
        "data": sources,
        "trained": config.adapter.kind if config.adapter.kind != "none" else "all parameters",
        "searcher": section.searcher.kind if section.searcher.kind != "auto" else "optuna (TPE)",
        "scheduler": section.scheduler.kind,
        "metric": ", ".join(f"{m} ({mode})" for m, mode in zip(section.metric, section.modes, strict=True)),
        "tokens": human_count(course.tokens),
        "wall time": f"{course.hours:.2f} hours",
    }
    if course.money is not None:
        facts["cost"] = f"{course.money:,.2f}"
    return facts
