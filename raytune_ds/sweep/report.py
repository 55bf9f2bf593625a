"""The report of a sweep: one HTML file that needs nothing else, to be read in a browser or printed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jinja2
import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from raytune_ds import storage
from raytune_ds.console import human_count, human_time
from raytune_ds.sweep.influence import importance, is_number, parallel
from raytune_ds.sweep.leaderboard import ABSENT, as_text, ordered, placed, searched, short, short_metric
from raytune_ds.sweep.plots import (
    BEST_COLOR,
    FONT,
    STATUS_COLORS,
    Plot,
    costs,
    curves,
    many,
    money,
    pareto,
    stops,
    values_text,
)
from raytune_ds.sweep.records import Goal, Report, Trial

CONFIG = {"displayModeBar": False, "responsive": True}


@dataclass(frozen=True)
class Cell:
    """Of the leaderboard: what is read, what it is sorted by, and its looks."""

    text: str
    key: float | str | None = None
    style: str = ""


@dataclass(frozen=True)
class Column:
    """Of the leaderboard."""

    title: str
    cell: Callable[[Trial], Cell]

    @property
    def title_parts(self) -> list[str]:
        """Between them a line may end."""
        return re.split(r"(?<=[._])", self.title)


def write_report(
    path: str,
    trials: Sequence[Trial],
    goal: Goal,
    facts: Mapping[str, str],
    price_per_hour: float | None = None,
) -> None:
    """Writes the report, whole or not at all.

    Args:
        path: of the HTML file, on any filesystem pyarrow opens.
        trials: all of the sweep, whatever became of them.
        goal: what makes one better than another.
        facts: label to text, shown as they are; "sweep" is the name in the title.
        price_per_hour: US dollars for an hour of one trial; None where it is not known.

    Raises:
        OSError: it can't be written.
    """
    storage.write_bytes(path, _page(trials, goal, facts, price_per_hour).encode())


def _page(trials: Sequence[Trial], goal: Goal, facts: Mapping[str, str], price_per_hour: float | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raytune_ds", "sweep"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    ranked, best = ordered(trials, goal), goal.best(trials)
    columns = _columns(ranked, goal, price_per_hour)
    plots = _plots(ranked, goal, price_per_hour)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        headline=_headline(ranked, goal),
        best=best,
        best_values=values_text(best) if best else [],
        totals=_totals(trials, price_per_hour),
        columns=columns,
        rows=[(trial.status, trial == best, [column.cell(trial) for column in columns]) for trial in ranked],
        plots=[(plot, _drawn(plot)) for plot in plots],
        reasons=[trial for trial in ranked if trial.reason],
        plotly_js=Markup(get_plotlyjs()) if any(plot.figure is not None for plot in plots) else None,
        colors={"best": BEST_COLOR, **STATUS_COLORS},
        font=Markup(FONT),
    )


def _plots(ranked: Sequence[Trial], goal: Goal, price_per_hour: float | None) -> list[Plot]:
    fronts = [pareto(ranked, goal, metric) for metric in goal.metrics[1:]]
    return [
        curves(ranked, goal),
        *fronts,
        parallel(ranked, goal),
        importance(ranked, goal),
        stops(ranked, goal),
        costs(ranked, goal, price_per_hour),
    ]


def _drawn(plot: Plot) -> Markup | None:
    if plot.figure is None:
        return None
    return Markup(
        plotly.io.to_html(
            plot.figure,
            config=CONFIG,
            include_plotlyjs=False,
            full_html=False,
            default_height=f"{plot.figure.layout.height}px",
            div_id=plot.name,
        )
    )


# ------------------------------------------------------------------------------------------------ words and table


def _headline(ranked: Sequence[Trial], goal: Goal) -> str:
    """Which trial is best, and by how much."""
    metric, best = goal.metrics[0], goal.best(ranked)
    if best is None:
        return f"No trial that did not fail has a value of {metric}." if ranked else "There are no trials."
    found = [trial.value(metric) or 0.0 for trial in placed(ranked, goal)]
    value, median = best.value(metric) or 0.0, statistics.median(found)
    so_far = " so far" if any(trial.status == "running" for trial in ranked) else ""
    text = f"Trial {best.name} is best{so_far}: {metric} {short_metric(value)}"
    if len(found) == 1:
        return f"{text}. No other trial has a value to compare it with."
    return f"{text}, {_versus(value, median)} the median of {len(found)} trials ({short_metric(median)})."


def _versus(value: float, median: float) -> str:
    if value == median:
        return "which is also"
    share = f" ({abs(value / median - 1):.1%})" if median > 0 else ""
    return f"{short_metric(abs(value - median))}{share} {'below' if value < median else 'above'}"


def _totals(trials: Sequence[Trial], price_per_hour: float | None) -> list[str]:
    """How many trials became what, and what all of them took."""
    counts = [(sum(trial.status == status for trial in trials), status) for status in STATUS_COLORS]
    last = [trial.last for trial in trials if trial.last]
    seconds = sum(report.seconds for report in last)
    return [
        many(len(trials), "trial"),
        *(f"{count} {status}" for count, status in counts if count),
        f"{human_count(sum(report.tokens for report in last))} tokens",
        f"{human_time(seconds)} of training",
        *([f"{money(seconds, price_per_hour)} US dollars"] if price_per_hour is not None else []),
    ]


def _columns(ranked: Sequence[Trial], goal: Goal, price_per_hour: float | None) -> list[Column]:
    """Those of every sweep, and those in which some trial has something."""
    ranks = {trial.number: rank for rank, trial in enumerate(placed(ranked, goal), 1)}
    return [
        Column("rank", lambda trial: _number(ranks.get(trial.number), str)),
        Column("trial", lambda trial: Cell(trial.name, trial.number)),
        Column("status", lambda trial: Cell(trial.status, trial.status, f"status {trial.status}")),
        *map(_value_column, searched(ranked)),
        *map(_metric_column, goal.metrics),
        Column("step", lambda trial: _step(trial.last)),
        Column("tokens", lambda trial: _number(trial.last.tokens if trial.last else None, human_count)),
        Column("time", lambda trial: _number(trial.last.seconds if trial.last else None, human_time)),
        *(
            column
            for column in _optional_columns(ranked, goal, price_per_hour)
            if any(column.cell(trial).key is not None for trial in ranked)
        ),
    ]


def _optional_columns(ranked: Sequence[Trial], goal: Goal, price_per_hour: float | None) -> Iterator[Column]:
    if price_per_hour is not None:
        yield Column("US $", lambda trial: _price(trial.last, price_per_hour))
    if "trainable_parameters" not in goal.metrics:
        yield _metric_column("trainable_parameters")
    if len(goal.metrics) > 1:
        front = goal.pareto(ranked)
        yield Column("Pareto", lambda trial: Cell("yes", 0) if trial.number in front else Cell(""))
    yield Column("origin", lambda trial: Cell(trial.origin or "", trial.origin))


def _number(value: float | None, shown: Callable[[float], str]) -> Cell:
    return Cell(ABSENT if value is None else shown(value), value, "number")


def _value_column(key: str) -> Column:
    def cell(trial: Trial) -> Cell:
        value = trial.values.get(key)
        if is_number(value):
            return Cell(short(value), value, "number")
        return Cell(short(value), None if value is None else as_text(value))

    return Column(key, cell)


def _metric_column(metric: str) -> Column:
    return Column(metric, lambda trial: _number(trial.value(metric), short_metric))


def _step(last: Report | None) -> Cell:
    return Cell(f"{last.step}/{last.total_steps}" if last else ABSENT, last.step if last else None, "number")


def _price(last: Report | None, price_per_hour: float) -> Cell:
    return _number(last.seconds if last else None, lambda seconds: money(seconds, price_per_hour))
