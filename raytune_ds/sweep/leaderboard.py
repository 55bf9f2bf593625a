"""The trials of a sweep as a table, the best first: leaderboard.csv, and what is printed."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ds import storage
from raytune_ds.console import human_count, human_time, out, table
from raytune_ds.sweep.records import Goal, Report, Trial

ABSENT = "-"
WIDEST_VALUE = 20
# Left out one after the other where the terminal is narrow.
EXPENDABLE = ("tokens", "time", "step", "rank")
FIXED_COLUMNS = ("rank", "trial", "status", "step", "tokens", "time")
STYLES = {"running": None, "finished": None, "stopped": "dim", "failed": "red"}


def rows(trials: Sequence[Trial], goal: Goal) -> tuple[list[str], list[list[Any]]]:
    """Column names, and a row for each trial: the best first, those without a value after them, failed ones at the end.

    Values are as they were searched, numbers in full, None for what is not known. seconds are those in training steps;
    only trials that did not fail and have a value have a rank.
    """
    keys, ranks = searched(trials), _ranks(trials, goal)
    front = goal.pareto(trials) if len(goal.metrics) > 1 else None
    found = [_row(trial, goal, keys, ranks.get(trial.number), front) for trial in ordered(trials, goal)]
    # Of no trial, for the names.
    columns = list(_row(Trial(0, {}), goal, keys, None, front))
    return columns, [list(row.values()) for row in found]


def ordered(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """The best first, failed ones at the end."""
    return sorted(goal.ranked(trials), key=lambda trial: trial.status == "failed")


def placed(trials: Sequence[Trial], goal: Goal) -> list[Trial]:
    """Those that have a rank, for they did not fail and have a value of the first metric; the best first."""
    return [t for t in goal.ranked(trials) if t.status != "failed" and t.value(goal.metrics[0]) is not None]


def searched(trials: Sequence[Trial]) -> list[str]:
    """Every dotted key that some trial has a value for, in the order of the values."""
    return list(dict.fromkeys(key for trial in trials for key in trial.values))


def write_csv(path: str, trials: Sequence[Trial], goal: Goal) -> None:
    """Writes `rows` as CSV (UTF-8), whole or not at all; lists as JSON text, what is not known as nothing.

    Args:
        path: of the file, on any filesystem pyarrow opens.
        trials: all of the sweep.
        goal: what makes one better than another.

    Raises:
        OSError: it can't be written.
    """
    columns, found = rows(trials, goal)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in found)
    storage.write_bytes(path, file.getvalue().encode())


def show(trials: Sequence[Trial], goal: Goal, most: int = 10) -> None:
    """Prints the best `most` trials, with what a person wants to know of them and the terminal has room for."""
    shown, best = ordered(trials, goal)[:most], goal.best(trials)
    columns = _fitting(_shown_columns(shown, trials, goal), out.width)
    styles = ["bold" if trial == best else STYLES[trial.status] for trial in shown]
    found = [list(row) for row in zip(*columns.values(), strict=True)]
    table(_title(len(shown), len(trials), goal), list(columns), found, styles)


def _shown_columns(shown: Sequence[Trial], trials: Sequence[Trial], goal: Goal) -> dict[str, list[str]]:
    """Heading to cells."""
    keys, ranks = searched(trials), _ranks(trials, goal)
    values = {
        _heading(name): [shortened(short(trial.values.get(key)), WIDEST_VALUE) for trial in shown]
        for key, name in zip(keys, _short_keys(keys, FIXED_COLUMNS), strict=True)
    }
    metrics = {_heading(m): [short_metric(trial.value(m)) for trial in shown] for m in goal.metrics}
    progress = [_progress(trial.last) for trial in shown]
    return {
        "rank": [str(ranks.get(trial.number, ABSENT)) for trial in shown],
        "trial": [trial.name for trial in shown],
        "status": [trial.status for trial in shown],
        **values,
        **metrics,
        **{name: [row[index] for row in progress] for index, name in enumerate(("step", "tokens", "time"))},
    }


def _heading(name: str) -> str:
    """A long name on two lines or more, for it is longer than what is below it."""
    return name if len(name) <= 8 else name.replace("_", "_\n").replace(".", ".\n")


def _fitting(columns: Mapping[str, list[str]], room: int) -> dict[str, list[str]]:
    """Without those of EXPENDABLE that there is no room for."""
    kept = dict(columns)
    for name in EXPENDABLE:
        if sum(_width(heading, cells) + 3 for heading, cells in kept.items()) + 1 > room:
            del kept[name]
    return kept


def _width(heading: str, cells: Sequence[str]) -> int:
    return max(map(len, [*heading.split("\n"), *cells]))


def _title(shown: int, total: int, goal: Goal) -> str:
    which = f"the best {shown} of {total} trials" if shown < total else f"{total} trial{'s' * (total != 1)}"
    return f"{which}, by {goal.metrics[0]} ({goal.modes[0]})"


def _ranks(trials: Sequence[Trial], goal: Goal) -> dict[int, int]:
    """Trial number to rank, of those that have one."""
    return {trial.number: rank for rank, trial in enumerate(placed(trials, goal), 1)}


def _row(
    trial: Trial, goal: Goal, keys: Sequence[str], rank: int | None, front: set[int] | None
) -> dict[str, Any]:
    """Column to value; a metric that is one of the other columns, too, is there once."""
    last, first = trial.last, goal.metrics[0]
    return {
        "rank": rank,
        "trial": trial.name,
        "status": trial.status,
        **{key: trial.values.get(key) for key in keys},
        **{metric: trial.value(metric) for metric in goal.metrics},
        f"best_{first}": _best_value(trial, goal),
        "step": last and last.step,
        "total_steps": last and last.total_steps,
        "reports": len(trial.reports),
        "tokens": last and last.tokens,
        "seconds": last and last.seconds,
        "trainable_parameters": trial.value("trainable_parameters"),
        **({} if front is None else {"pareto": trial.number in front}),
        "reason": trial.reason,
        "origin": trial.origin,
        "run": trial.run,
    }


def _best_value(trial: Trial, goal: Goal) -> float | None:
    """Of the first metric, over all reports."""
    found = [report.metrics.get(goal.metrics[0]) for report in trial.reports]
    known = [value for value in found if value is not None and math.isfinite(value)]
    return (min if goal.modes[0] == "min" else max)(known, default=None)


def _cell(value: object) -> object:
    """Of CSV, where None is nothing."""
    return as_text(value) if isinstance(value, list | tuple | Mapping | bool) else value


def as_text(value: object) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------------ short forms


def short(value: object) -> str:
    """A searched value for people: 3.1e-04, 0.125, 16, auto, [q_proj, o_proj]."""
    if value is None:
        return ABSENT
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(short, value))}]"
    if not isinstance(value, float):
        return as_text(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def short_metric(value: float | None) -> str:
    """A metric for people: 1.2345, 153.3, 331k."""
    if value is None:
        return ABSENT
    if abs(value) >= 1e4:
        return human_count(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def shortened(text: str, width: int) -> str:
    """At most so many characters, the last one a mark where some are missing."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _short_keys(keys: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The last part of each dotted key; all of it where that is another one's, too, or taken."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if [*last, *taken].count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def _progress(last: Report | None) -> list[str]:
    if last is None:
        return [ABSENT] * 3
    return [f"{last.step}/{last.total_steps}", human_count(last.tokens), human_time(last.seconds)]
