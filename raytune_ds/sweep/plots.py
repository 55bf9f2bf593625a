"""What the report of a sweep shows: curves, what beats what, how far each trial came, and what it cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from raytune_ds import storage
from raytune_ds.console import human_count, human_time
from raytune_ds.sweep.leaderboard import placed, short, short_metric, shortened
from raytune_ds.sweep.records import Goal, Report, Status, Trial

BEST_COLOR = "#e8590c"
STATUS_COLORS: dict[Status, str] = {
    "finished": "#3b6fb6",
    "stopped": "#a3acb8",
    "running": "#0c8599",
    "failed": "#c2255c",
}
GRID, INK, TRACK = "#e9ecef", "#212529", "#f1f3f5"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES: dict[Status, str] = {"finished": "solid", "stopped": "solid", "running": "dash", "failed": "dot"}

# As in the drawings of runs: where losses span more than this, the differences at the end would not be seen.
LOG_METRIC_RATIO = 10
WIDEST_VALUE, WIDEST_HOVER = 60, 70
# Above so many trials the bars are thin, and what is written on them is left to the hover text.
MANY_TRIALS = 40
# The longest bar is 1; what is written beside it takes the rest.
ROOM_FOR_A_STEP, ROOM_FOR_A_COST = 1.06, 1.3
TIME_STEPS = (1, 5, 15, 60, 120, 300, 900, 1800, 3600, 7200, 21600, 43200, 86400)


@dataclass(frozen=True)
class Plot:
    """A section of the report: a figure, or None and why there is none."""

    name: str
    title: str
    caption: str
    figure: go.Figure | None = None


# ------------------------------------------------------------------------------------------------ what plots share


def plot_layout(height: int, **more: Any) -> dict[str, Any]:
    """A figure's layout, `height` pixels high; `more` as plotly names it."""
    font = {"family": FONT, "size": 12, "color": INK}
    return {
        "height": height,
        "template": None,
        "font": font,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": font},
        "hovermode": "closest",
        **more,
    }


def plot_axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis of a figure; `more` as plotly names it."""
    return {"title": {"text": safe(title)}, "gridcolor": GRID, "zeroline": False, "automargin": True, **more}


def safe(text: str) -> str:
    """For what is drawn, in which plotly reads some HTML."""
    return escape(text, quote=False)


def hover_text(trial: Trial, goal: Goal, *more: str) -> str:
    """What is told of a trial where a plot shows it."""
    lines = [
        *(f"{metric}: {short_metric(trial.value(metric))}" for metric in goal.metrics),
        *(f"{key}: {text}" for key, text in values_text(trial)),
        *more,
        *([trial.reason] if trial.reason else []),
    ]
    wrapped = [part for line in lines for part in textwrap.wrap(line, WIDEST_HOVER)]
    return "<br>".join([f"<b>trial {trial.name}</b>, {trial.status}", *map(safe, wrapped)])


def values_text(trial: Trial) -> list[tuple[str, str]]:
    """Key and value of what is searched, for people."""
    return [(key, shortened(short(value), WIDEST_VALUE)) for key, value in trial.values.items()]


def color_of(trial: Trial, best: Trial | None) -> str:
    """The same in all plots."""
    return BEST_COLOR if trial == best else STATUS_COLORS[trial.status]


def _metric_axis(metric: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    if not wants_log_scale(values):
        return plot_axis(metric, **more)
    few_decades = max(values) < 1e3 * min(values)
    return plot_axis(metric, type="log", dtick="D2" if few_decades else 1, **more)


def wants_log_scale(values: Sequence[float]) -> bool:
    """Of a metric."""
    return bool(values) and min(values) > 0 and max(values) > LOG_METRIC_RATIO * min(values)


def money(seconds: float, price_per_hour: float) -> str:
    """In the currency of the price."""
    return f"{seconds / 3600 * price_per_hour:,.2f}"


def many(count: int, what: str) -> str:
    """1 trial, 2 trials."""
    return f"{count} {what}{'s' * (count != 1)}"


# ------------------------------------------------------------------------------------------------ curves


def curves(ranked: Sequence[Trial], goal: Goal) -> Plot:
    """The first metric of each trial, over what it was trained on."""
    metric, best = goal.metrics[0], goal.best(ranked)
    drawn = [trial for trial in ranked if any(value is not None for value in _course(trial, metric))]
    title = f"{metric} over tokens"
    if not drawn:
        return Plot("curves", title, f"There is nothing to draw: no trial has reported {metric}.")
    values = [value for trial in drawn for value in _course(trial, metric) if value is not None]
    figure = go.Figure(
        # The best is drawn last, over the others, and named first.
        [_curve(trial, goal, best, rank) for rank, trial in reversed(list(enumerate(drawn, 1)))],
        plot_layout(
            max(420, min(640, 21 * len(drawn) + 130)),
            xaxis=plot_axis("tokens trained on", tickformat="~s", rangemode="tozero"),
            yaxis=_metric_axis(metric, values),
            legend={
                "traceorder": "grouped",
                "groupclick": "toggleitem",
                "font": {"size": 11},
                "tracegroupgap": 6,
            },
        ),
    )
    if best:
        figure.add_annotation(_name_at_the_end(best, metric, wants_log_scale(values)))
    missing = [trial.name for trial in ranked if trial not in drawn]
    caption = (
        f"{metric} at each report. Orange: the best; grey: stopped early. Click a name to hide or show a trial, "
        "double-click it to see it alone; drag over a part to enlarge it, double-click to see all."
    )
    if missing:
        caption += f" Without a value: {', '.join(missing)}."
    return Plot("curves", title, caption, figure)


def _course(trial: Trial, metric: str) -> list[float | None]:
    """A metric at each report; None where it is not known or no number."""
    return [storage.finite(report.metrics.get(metric)) for report in trial.reports]


def _curve(trial: Trial, goal: Goal, best: Trial | None, rank: int) -> go.Scatter:
    metric, is_best = goal.metrics[0], trial == best
    course = _course(trial, metric)
    return go.Scatter(
        x=[report.tokens for report in trial.reports],
        y=course,
        name=trial.name,
        legendgroup=trial.status,
        legendrank=rank,
        legendgrouptitle={"text": trial.status},
        mode="lines+markers",
        opacity=1 if is_best else 0.85,
        line={
            "color": color_of(trial, best),
            "width": 3.5 if is_best else 1.6,
            "dash": DASHES[trial.status],
        },
        marker={"size": 7 if is_best else 4.5, "symbol": "x" if trial.status == "failed" else "circle"},
        hoverinfo="text",
        hovertext=[
            hover_text(trial, goal, f"here, step {report.step}: {short_metric(value)}")
            for report, value in zip(trial.reports, course, strict=True)
        ],
    )


def _name_at_the_end(trial: Trial, metric: str, log: bool) -> dict[str, Any]:
    """Annotations on a log axis are placed by the logarithm."""
    last, value = trial.reports[-1], trial.value(metric) or 0.0
    return {
        "x": last.tokens,
        "y": math.log10(value) if log else value,
        "text": f"<b>{trial.name}</b>",
        "font": {"color": BEST_COLOR, "size": 12},
        "showarrow": False,
        "xanchor": "right",
        "yanchor": "top",
        "yshift": -5,
    }


# ------------------------------------------------------------------------------------------------ Pareto


def pareto(ranked: Sequence[Trial], goal: Goal, other: str) -> Plot:
    """The first metric against another one."""
    first, best = goal.metrics[0], goal.best(ranked)
    title, name = f"{first} against {other}", f"pareto-{goal.metrics.index(other)}"
    known = [trial for trial in placed(ranked, goal) if trial.value(other) is not None]
    if len(known) < 2:
        return Plot(name, title, "There is nothing to compare: fewer than two trials have a value of both.")
    numbers = goal.pareto(ranked)
    front = sorted((t for t in known if t.number in numbers), key=lambda t: t.value(other) or 0.0)
    traces = [_points(known, goal, other, numbers, best)]
    if len(goal.metrics) == 2:
        traces.insert(0, _front_line(front, goal, other))
    figure = go.Figure(
        traces,
        plot_layout(
            420,
            showlegend=False,
            xaxis=_metric_axis(other, _known(known, other), tickformat="~s"),
            yaxis=_metric_axis(first, _known(known, first)),
        ),
    )
    beside = " and the other metrics" * (len(goal.metrics) > 2)
    wanted = f"{first} {_wanted(goal, first)}, {other} {_wanted(goal, other)}"
    caption = (
        f"Wanted: {wanted}. Ringed and named: the {many(len(front), 'trial')} that no other one beats in "
        f"both{beside}."
    )
    return Plot(name, title, caption, figure)


def _wanted(goal: Goal, metric: str) -> str:
    return "low" if goal.modes[goal.metrics.index(metric)] == "min" else "high"


def _known(trials: Sequence[Trial], metric: str) -> list[float]:
    return [value for value in (trial.value(metric) for trial in trials) if value is not None]


def _points(
    known: Sequence[Trial], goal: Goal, other: str, front: set[int], best: Trial | None
) -> go.Scatter:
    is_front = [trial.number in front for trial in known]
    return go.Scatter(
        x=[trial.value(other) for trial in known],
        y=[trial.value(goal.metrics[0]) for trial in known],
        mode="markers+text",
        text=[trial.name if inside else "" for trial, inside in zip(known, is_front, strict=True)],
        textposition="top right",
        textfont={"size": 11},
        marker={
            "color": [color_of(trial, best) for trial in known],
            "size": [13 if inside else 9 for inside in is_front],
            "line": {"color": INK, "width": [2 if inside else 0 for inside in is_front]},
        },
        cliponaxis=False,
        hoverinfo="text",
        hovertext=[hover_text(trial, goal) for trial in known],
    )


def _front_line(front: Sequence[Trial], goal: Goal, other: str) -> go.Scatter:
    """In steps: between two points of the front nothing was reached but the worse corner."""
    shape = "hv" if goal.modes[1] == "min" else "vh"
    return go.Scatter(
        x=[trial.value(other) for trial in front],
        y=[trial.value(goal.metrics[0]) for trial in front],
        mode="lines",
        line={"color": "#868e96", "width": 1.2, "dash": "dot", "shape": shape},
        hoverinfo="skip",
    )


# ------------------------------------------------------------------------------------------------ stops and cost


def stops(ranked: Sequence[Trial], goal: Goal) -> Plot:
    """How far each trial came."""
    name, title = "stops", "How far each trial came"
    begun = [(trial, trial.last) for trial in ranked if trial.last]
    if not begun:
        return Plot(name, title, "There is nothing to draw: no trial has reported anything.")
    trials = [trial for trial, _ in begun]
    done = _bars(
        trials,
        goal.best(ranked),
        [_share_done(last) for _, last in begun],
        [str(last.step) for _, last in begun],
        [
            hover_text(trial, goal, f"step {last.step} of {last.total_steps}, report {last.number}")
            for trial, last in begun
        ],
    )
    track = go.Bar(x=[1] * len(begun), y=done.y, orientation="h", marker={"color": TRACK}, hoverinfo="skip")
    shares = plot_axis(
        "share of the run done, and the step",
        tickformat=".0%",
        tickvals=[0, 0.25, 0.5, 0.75, 1],
        range=[0, ROOM_FOR_A_STEP],
        fixedrange=True,
    )
    figure = go.Figure([track, done], _bars_layout(len(begun), xaxis=shares))
    return Plot(name, title, f"{_spared(ranked)} The best trial is at the top.", figure)


def _bars_layout(count: int, **more: Any) -> dict[str, Any]:
    """Of a bar for each trial."""
    height = 24 if count <= MANY_TRIALS else 13
    # Names that look like numbers are no numbers.
    axis = plot_axis(
        type="category", autorange="reversed", dtick=1, ticksuffix=" ", showgrid=False, fixedrange=True
    )
    return plot_layout(
        height * count + 80, barmode="overlay", bargap=0.3, showlegend=False, yaxis=axis, **more
    )


def _bars(
    trials: Sequence[Trial],
    best: Trial | None,
    lengths: Sequence[float],
    texts: Sequence[str],
    hover: Sequence[str],
) -> go.Bar:
    """One for each trial."""
    return go.Bar(
        x=lengths,
        y=[trial.name for trial in trials],
        orientation="h",
        marker={"color": [color_of(trial, best) for trial in trials]},
        text=texts if len(trials) <= MANY_TRIALS else None,
        textposition="outside",
        textfont={"size": 11},
        hoverinfo="text",
        hovertext=hover,
    )


def _share_done(last: Report) -> float:
    return min(1.0, last.step / last.total_steps) if last.total_steps else 0.0


def _spared(trials: Sequence[Trial]) -> str:
    """What stopping early was good for."""
    cut = [t.last for t in trials if t.status == "stopped" and t.last and 0 < _share_done(t.last) < 1]
    if not cut:
        return "No trial was stopped early."
    left = [1 / _share_done(last) - 1 for last in cut]
    tokens = sum(last.tokens * more for last, more in zip(cut, left, strict=True))
    seconds = sum(last.seconds * more for last, more in zip(cut, left, strict=True))
    were = "trial was" if len(cut) == 1 else "trials were"
    return (
        f"{len(cut)} {were} stopped early; going on to the end would have taken another {human_count(tokens)} tokens "
        f"and {human_time(seconds)}."
    )


def costs(ranked: Sequence[Trial], goal: Goal, price_per_hour: float | None) -> Plot:
    """Tokens, time, and money where the price is known."""
    name, heading, best = "costs", "What each trial cost", goal.best(ranked)
    begun = [(trial, trial.last) for trial in ranked if trial.last]
    if not begun:
        return Plot(name, heading, "Nothing was spent: no trial has reported anything.")
    trials = [trial for trial, _ in begun]
    tokens, seconds = [last.tokens for _, last in begun], [last.seconds for _, last in begun]
    times = [_time_and_money(spent, price_per_hour) for spent in seconds]
    hover = [
        hover_text(trial, goal, f"{human_count(count)} tokens", time)
        for trial, count, time in zip(trials, tokens, times, strict=True)
    ]
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06)
    figure.add_trace(_bars(trials, best, tokens, list(map(human_count, tokens)), hover), 1, 1)
    figure.add_trace(_bars(trials, best, seconds, times, hover), 1, 2)
    layout = _bars_layout(len(begun))
    figure.update_layout(layout, yaxis2={**layout["yaxis"], "showticklabels": False})
    for column, title, longest, ticks in (
        (1, "tokens", max(tokens), {"tickformat": "~s"}),
        (2, "time in training steps", max(seconds), _time_ticks(max(seconds))),
    ):
        axis = plot_axis(title, range=[0, ROOM_FOR_A_COST * max(1.0, longest)], fixedrange=True)
        figure.update_xaxes({**axis, **ticks}, col=column)
    caption = (
        "Tokens trained on, and time in training steps; start-up, evaluation and checkpoints come on top."
    )
    if price_per_hour is not None:
        caption += f" Money: {price_per_hour:,.2f} US dollars for an hour of a trial."
    return Plot(name, heading, caption, figure)


def _time_and_money(seconds: float, price_per_hour: float | None) -> str:
    time = human_time(seconds)
    return time if price_per_hour is None else f"{time}, ${money(seconds, price_per_hour)}"


def _time_ticks(longest: float) -> dict[str, Any]:
    """At most five, at whole seconds, minutes, hours or days."""
    step = next((step for step in TIME_STEPS if longest / step <= 4), math.ceil(longest / 4 / 86400) * 86400)
    ticks = [step * index for index in range(int(longest // step) + 1)]
    return {"tickvals": ticks, "ticktext": [human_time(tick) for tick in ticks]}
