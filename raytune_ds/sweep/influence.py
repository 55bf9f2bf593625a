"""Which searched settings make a difference in a sweep."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeGuard

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from raytune_ds.sweep.leaderboard import placed, searched, short, short_metric, shortened
from raytune_ds.sweep.plots import (
    BEST_COLOR,
    STATUS_COLORS,
    Plot,
    hover_text,
    many,
    plot_axis,
    plot_layout,
    safe,
    wants_log_scale,
)
from raytune_ds.sweep.records import Goal, Trial

SCALE = "Viridis"
# From this ratio on between the largest and the smallest value, a setting may be drawn on a log scale.
LOG_SETTING_RATIO = 8
MOST_TICKS, WIDEST_TICK = 6, 18
# More values than these that are not all numbers are hardly a choice; fANOVA would take minutes for them, too.
MOST_CATEGORIES = 12
FEWEST_FOR_IMPORTANCE = 5
# PED-ANOVA compares the best trials with all; with fewer than five of them it says little.
BEST_OF_PED_ANOVA = 5


@dataclass(frozen=True)
class Axis:
    """A searched key on a line: where each trial's value lies on it.

    Attributes:
        key: dotted.
        places: of each trial.
        ticks: place and text.
        is_scale: whether the order of places means something; else they are categories.
    """

    key: str
    places: list[float]
    ticks: list[tuple[float, str]]
    is_scale: bool

    @property
    def varies(self) -> bool:
        """Whether it can make a difference."""
        return len(set(self.places)) > 1

    def share(self, place: float) -> float:
        """How far up it lies."""
        low, high = min(self.places), max(self.places)
        return 0.5 if low == high else (place - low) / (high - low)


# ------------------------------------------------------------------------------------------------ parallel coordinates


def parallel(ranked: Sequence[Trial], goal: Goal) -> Plot:
    """Parallel coordinates: an axis for each searched key and one for the metric, a line for each trial."""
    name, title, metric = "parallel", "Settings and what came of them", goal.metrics[0]
    valued = placed(ranked, goal)
    if len(valued) < 2:
        return Plot(name, title, f"There is nothing to compare: {_few(valued)} a value of {metric}.")
    axes = _axes(valued)
    changing = [axis for axis in axes if axis.varies]
    if not changing:
        return Plot(
            name, title, "There is nothing to compare: all trials with a value have the same settings."
        )
    figure = _parallel_figure(valued, goal, [*changing, _metric_axis(valued, metric)])
    caption = (
        f"A line is a trial, coloured by {metric} at its newest report (dark is better); orange and thick: the best; "
        "thin: stopped early, at the value it was stopped with."
    )
    if constant := [f"{axis.key} = {axis.ticks[0][1]}" for axis in axes if not axis.varies]:
        caption += f" The same in all: {', '.join(constant)}."
    return Plot(name, title, caption, figure)


def _few(valued: Sequence[Trial]) -> str:
    return "no trial has" if not valued else "only one trial has"


def _parallel_figure(valued: Sequence[Trial], goal: Goal, axes: Sequence[Axis]) -> go.Figure:
    lines = [
        _parallel_line(trial, goal, [axis.share(axis.places[index]) for axis in axes], index == 0)
        for index, trial in enumerate(valued)
    ]
    names = {
        "tickvals": list(range(len(axes))),
        "ticktext": [f"<b>{safe(axis.key).replace('.', '.<br>')}</b>" for axis in axes],
        "tickangle": 0,
        "range": [-0.05, len(axes) - 0.95],
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
    }
    layout = plot_layout(
        430,
        showlegend=False,
        margin={"l": 120, "r": 70, "t": 20, "b": 50},
        xaxis=names,
        yaxis={"visible": False, "range": [-0.06, 1.06], "fixedrange": True},
        shapes=[
            {"type": "line", "x0": n, "x1": n, "y0": 0, "y1": 1, "line": {"color": "#868e96", "width": 1}}
            for n in range(len(axes))
        ],
        annotations=[
            _tick(column, axis.share(place), text, column == len(axes) - 1)
            for column, axis in enumerate(axes)
            for place, text in axis.ticks
        ],
    )
    # The best is drawn last, over the others.
    return go.Figure(lines[::-1], layout)


def _tick(column: int, share: float, text: str, is_outermost: bool) -> dict[str, Any]:
    """Of the outermost axis to the right, where no line is in its way."""
    return {
        "x": column,
        "y": share,
        "text": safe(shortened(text, WIDEST_TICK)),
        "hovertext": safe(text),
        "showarrow": False,
        "xanchor": "left" if is_outermost else "right",
        "xshift": 7 if is_outermost else -7,
        "font": {"size": 11},
        "bgcolor": "rgba(255,255,255,0.8)",
        "borderpad": 1,
    }


def _parallel_line(trial: Trial, goal: Goal, shares: Sequence[float], is_best: bool) -> go.Scatter:
    """The last share is that of the metric."""
    badness = shares[-1] if goal.modes[0] == "min" else 1 - shares[-1]
    # The brightest end is hard to see on white.
    color = BEST_COLOR if is_best else sample_colorscale(SCALE, [0.95 * badness])[0]
    return go.Scatter(
        x=list(range(len(shares))),
        y=shares,
        mode="lines+markers",
        line={"color": color, "width": 4 if is_best else 1.2 if trial.status == "stopped" else 2.2},
        marker={"size": 8 if is_best else 6, "color": color},
        opacity=1 if is_best else 0.8,
        hoverinfo="text",
        hovertext=[hover_text(trial, goal)] * len(shares),
    )


def _axes(trials: Sequence[Trial]) -> list[Axis]:
    return [_setting_axis(key, [trial.values.get(key) for trial in trials]) for key in searched(trials)]


def _setting_axis(key: str, values: Sequence[object]) -> Axis:
    """Numbers on a linear or log scale; where there is anything else, one value after the other."""
    numbers = [value for value in values if is_number(value)]
    if len(numbers) == len(values):
        return _number_axis(key, numbers, _is_log_setting(numbers), short)
    texts = {short(value): (1, 0.0) if not is_number(value) else (0, value) for value in values}
    place = {text: float(index) for index, text in enumerate(sorted(texts, key=lambda t: (texts[t], t)))}
    ticks = [(at, text) for text, at in place.items()][:: math.ceil(len(place) / MOST_CATEGORIES)]
    return Axis(key, [place[short(value)] for value in values], ticks, len(place) > MOST_CATEGORIES)


def _is_log_setting(numbers: Sequence[float]) -> bool:
    """Whether the values span much, and their middle is nearer to that of a log scale: how it was searched."""
    low, high = min(numbers), max(numbers)
    if low <= 0 or high < LOG_SETTING_RATIO * low:
        return False
    middle = statistics.median(set(numbers))
    on_linear, on_log = (middle - low) / (high - low), math.log(middle / low) / math.log(high / low)
    return abs(on_log - 0.5) < abs(on_linear - 0.5)


def _metric_axis(valued: Sequence[Trial], metric: str) -> Axis:
    values = [trial.value(metric) or 0.0 for trial in valued]
    return _number_axis(metric, values, wants_log_scale(values), short_metric)


def _number_axis(key: str, numbers: Sequence[float], log: bool, shown: Callable[[float], str]) -> Axis:
    """Ticks are at the values themselves where they are few, as they are of a choice."""
    place: Callable[[float], float] = math.log10 if log else float
    marks = sorted(set(numbers))
    if len(marks) > MOST_TICKS:
        marks, shown = (_round_logs if log else _round_numbers)(marks[0], marks[-1]), short
    return Axis(key, list(map(place, numbers)), [(place(mark), shown(mark)) for mark in marks], True)


def _round_numbers(low: float, high: float) -> list[float]:
    """Two to seven of them, a round distance apart."""
    tenth = 10.0 ** math.floor(math.log10(high - low))
    step = next(s for s in (tenth / 5, tenth / 2, tenth, tenth * 2) if (high - low) / s <= MOST_TICKS)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_logs(low: float, high: float) -> list[float]:
    """1 and 3 times powers of ten, or powers of ten alone, or some of them, where these are enough."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [mark for mark in (x * power for power in powers for x in (1, 3)) if low <= mark <= high]
    if len(fine) <= MOST_TICKS:
        return fine
    inside = [mark for mark in powers if low <= mark <= high]
    return inside[:: math.ceil(len(inside) / MOST_TICKS)]


def is_number(value: object) -> TypeGuard[float]:
    """Whether it has a place among numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------ importance


def importance(ranked: Sequence[Trial], goal: Goal) -> Plot:
    """How much of the differences between the trials each setting accounts for."""
    name, title, metric = "importance", "Which settings matter", goal.metrics[0]
    valued = placed(ranked, goal)
    axes = [axis for axis in _axes(valued) if axis.varies]
    if reason := _why_no_importance(valued, axes, metric):
        return Plot(name, title, reason)
    has_sklearn = find_spec("sklearn") is not None
    shares = _importances(valued, axes, goal, has_sklearn)
    if not any(shares.values()):
        return Plot(name, title, f"None shows an influence on {metric} in {many(len(valued), 'trial')}.")
    caption = (
        f"Each setting's share of the differences in {metric}, over {many(len(valued), 'trial')} and by itself "
        f"({'fANOVA' if has_sklearn else 'PED-ANOVA'}). Each trial counts with its newest report: stopped ones with "
        "the value they were stopped at. From few trials this is a hint, no proof."
    )
    return Plot(name, title, caption, _importance_figure(shares))


def _why_no_importance(valued: Sequence[Trial], axes: Sequence[Axis], metric: str) -> str | None:
    if len(valued) < FEWEST_FOR_IMPORTANCE:
        return f"This takes at least {FEWEST_FOR_IMPORTANCE} trials with a value of {metric}; there are {len(valued)}."
    if not axes:
        return "All trials with a value have the same settings."
    if len(axes) == 1:
        return f"Only {axes[0].key} differs between the trials, so there is nothing to weigh it against."
    if len({trial.value(metric) for trial in valued}) == 1:
        return f"All trials have the same {metric}, so no setting made a difference."
    return None


def _importances(
    valued: Sequence[Trial], axes: Sequence[Axis], goal: Goal, has_sklearn: bool
) -> dict[str, float]:
    """Key to its share, the largest first; fANOVA is the better one for few trials, but needs scikit-learn."""
    import optuna

    # Half of optuna is experimental, and says so whenever it is used.
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = _study(valued, axes, goal)
            if has_sklearn:
                evaluator: Any = optuna.importance.FanovaImportanceEvaluator(seed=0)
            else:
                quantile = min(0.5, max(0.1, BEST_OF_PED_ANOVA / len(valued)))
                evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    finally:
        optuna.logging.set_verbosity(verbosity)
    total = sum(shares.values())
    return {key: share / total if total else 0.0 for key, share in shares.items()}


def _study(valued: Sequence[Trial], axes: Sequence[Axis], goal: Goal) -> Any:
    """The trials as optuna knows them.

    Settings and metric are where they lie on their axes: fANOVA knows no log scale, and no large numbers.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distributions: dict[str, Any] = {
        axis.key: FloatDistribution(0, 1)
        if axis.is_scale
        else CategoricalDistribution(sorted(set(axis.places)))
        for axis in axes
    }
    outcome = _metric_axis(valued, goal.metrics[0])
    study = optuna.create_study(direction="minimize" if goal.modes[0] == "min" else "maximize")
    for index, value in enumerate(outcome.places):
        params = {a.key: a.share(a.places[index]) if a.is_scale else a.places[index] for a in axes}
        study.add_trial(
            optuna.trial.create_trial(value=outcome.share(value), params=params, distributions=distributions)
        )
    return study


def _importance_figure(shares: Mapping[str, float]) -> go.Figure:
    bars = go.Bar(
        x=list(shares.values()),
        y=[safe(key) for key in shares],
        orientation="h",
        marker={"color": STATUS_COLORS["finished"]},
        text=[f"{share:.0%}" for share in shares.values()],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    names = plot_axis(type="category", autorange="reversed", showgrid=False, ticksuffix=" ", fixedrange=True)
    layout = plot_layout(
        34 * len(shares) + 60,
        bargap=0.35,
        margin={"l": 60, "r": 50, "t": 10, "b": 40},
        xaxis=plot_axis(tickformat=".0%", rangemode="tozero", fixedrange=True),
        yaxis=names,
    )
    return go.Figure(bars, layout)
