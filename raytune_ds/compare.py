"""Runs side by side, from their run directories alone: a table, the settings they differ in, and their curves."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import plotext
import pyarrow
from rich.table import Table
from rich.text import Text

from raytune_ds import storage
from raytune_ds.console import human_count, human_time, out, say
from raytune_ds.errors import UserError
from raytune_ds.rundir import RunDir, parse_lines

Points = list[tuple[float, float]]
"""x and y."""

ABSENT = "-"
WIDEST_CELL = 20
DRAWING_WIDTH, DRAWING_HEIGHT = 100, 18
DRAWING_COLORS = ("blue+", "orange", "green", "magenta", "cyan", "red")
PLOT_FORMATS = (".png", ".svg")
PLOT_POINTS = 1000
LINE_STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
# What is plotted is the mean over this share of the run.
SMOOTHED_OVER = 0.05
# Settings that decide which tokens the loss is a mean over, or what it is: sections and keys, and an exception.
DECIDE_THE_LOSS = ("model.name", "objective.", "data.")
DECIDE_NOTHING = ("data.prepare_memory_mib", "data.on_finding")


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: short, and no other run's of the comparison.
        config: by dotted keys.
        result: of result.json; empty if the run has not ended.
        rows: of metrics.jsonl.
        checkpoint_bytes: the size of the newest complete checkpoint.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    checkpoint_bytes: int | None

    def points(self, metric: str) -> Points:
        """(step, value) of the rows that have this metric."""
        return [(row["step"], row[metric]) for row in self.rows if _is_number(row.get(metric))]

    def values(self, metric: str) -> list[float]:
        """The values of a metric, in order."""
        return [value for _, value in self.points(metric)]

    @property
    def has_losses(self) -> bool:
        """Whether there is something to draw."""
        return bool(self.points("loss") or self.points("eval_loss"))

    def counted(self, *metrics: str) -> dict[float, float]:
        """Step to the sum of some metrics over all rows up to it."""
        sums = accumulate(sum(row[m] for m in metrics if _is_number(row.get(m))) for row in self.rows)
        return {row["step"]: total for row, total in zip(self.rows, sums, strict=True)}


def compare(paths: Sequence[str], plot: str | None = None) -> None:
    """Prints and draws runs side by side.

    Args:
        paths: two or more run directories.
        plot: a .png or .svg file to draw the loss curves into.

    Raises:
        UserError: fewer than two runs, a directory that is none of a run, damaged files, no place for the plot.
    """
    if plot is not None:
        _check_plot(Path(plot))
    runs = read_runs(paths)
    names = [run.name for run in runs]
    _print_table("runs", names, facts(runs))
    if changed := differences(runs):
        _print_table("settings they differ in", names, [[key, *values] for key, values in changed.items()])
    else:
        say("no setting differs")
    if keys := incomparable(runs, changed):
        say(f"their losses are not comparable, because these differ: {', '.join(keys)}", style="yellow")
    if not any(run.has_losses for run in runs):
        say("no losses to draw yet")
        return
    out.print(drawing(runs, min(out.width, DRAWING_WIDTH)))
    if plot is not None:
        _write_plot(runs, Path(plot))
        say(f"curves drawn into {plot}")


# ------------------------------------------------------------------------------------------------ reading


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs at some directories; one that is named twice counts once.

    Raises:
        UserError: fewer than two, or all that can't be read.
    """
    places = list(dict.fromkeys(storage.absolute(path) for path in paths))
    if len(places) < 2:
        raise UserError("compare: name at least two run directories, such as runs/a runs/b.")
    runs, problems = [], []
    for place, name in zip(places, _short_names(places), strict=True):
        try:
            runs.append(_read_run(RunDir(place), name))
        except UserError as error:
            problems.append(str(error))
        except (OSError, pyarrow.ArrowInvalid) as error:
            problems.append(f"{place}: can't be read: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return runs


def _short_names(places: Sequence[str]) -> list[str]:
    """The last part of each path, and of equal ones as many as it takes to tell them apart."""
    return [_short_name(place, [p for p in places if p != place]) for place in places]


def _short_name(place: str, others: Sequence[str]) -> str:
    parts = place.split("/")
    for count in range(1, len(parts)):
        if all(other.split("/")[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return place


def _read_run(run: RunDir, name: str) -> Run:
    config = _read_config(run)
    rows = _read_rows(run)
    return Run(name, dict(_flat(config)), _read_object(run.result) or {}, rows, _checkpoint_bytes(run))


def _read_config(run: RunDir) -> dict[str, Any]:
    config = _read_object(run.config)
    if config is None and not storage.exists(run.path):
        raise UserError(f"{run.path}: there is no such directory; check the path.")
    # The config.json of a model, as in final/, is not one of a run.
    if config is None or not {"run", "model", "train"} <= config.keys():
        raise UserError(f"{run.path}: is no run directory; name the one that holds a run's config.json.")
    return config


def _read_rows(run: RunDir) -> list[dict[str, Any]]:
    if not storage.exists(run.metrics):
        return []
    rows = []
    for number, line in enumerate(io.BytesIO(storage.read_bytes(run.metrics)), 1):
        try:
            found = parse_lines(line)
        except ValueError:
            found = [{}]
        if not all(isinstance(row, dict) and _is_number(row.get("step")) for row in found):
            raise UserError(
                f"{run.metrics}, line {number}: is damaged; delete the line, or leave the run out."
            )
        rows += found
    return rows


def _read_object(path: str) -> dict[str, Any] | None:
    """A JSON object; None if the file is not there."""
    try:
        value = storage.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is damaged ({error}); mend it, or leave the run out.") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: is damaged (no JSON object); mend it, or leave the run out.")
    return value


def _checkpoint_bytes(run: RunDir) -> int | None:
    """The size of the newest checkpoint that is complete; one may be in the making, another just being deleted."""
    for name in reversed(storage.list_names(run.checkpoints)):
        try:
            manifest = json.loads(storage.read_bytes(f"{run.checkpoints}/{name}/manifest.json"))
            return sum(file["size"] for file in manifest["files"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, as an override writes them: data.sources.0.path."""
    for name, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------ the table


Fact = Callable[[Run], object]
"""What a run is or has; None if it has not."""


def facts(runs: Sequence[Run]) -> list[list[str]]:
    """The table's rows: what it is, then that of each run."""
    rows = [[label, *(_shown(fact(run)) for run in runs)] for label, fact in FACTS.items()]
    return [row for row in rows if row[0] not in OPTIONAL or set(row[1:]) != {ABSENT}]


def _shown(fact: object) -> str:
    return ABSENT if fact is None else str(fact)


def _from_result(key: str, shown: Callable[[Any], str]) -> Callable[[Run], str | None]:
    """A fact of result.json; a run that failed has zeros there."""
    return lambda run: shown(run.result[key]) if run.result.get(key) else None


def _from_rows(metric: str, chosen: Callable[[list[float]], float], form: Callable[[float], str]) -> Fact:
    """A fact of metrics.jsonl, made from all values of a metric."""
    return lambda run: form(chosen(run.values(metric))) if run.points(metric) else None


def _last(values: list[float]) -> float:
    return values[-1]


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _size(count: float) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def _status(run: Run) -> str:
    return run.result.get("status", "unfinished")


def _workers(run: Run) -> int | None:
    sizes = run.values("world_size")
    return run.result.get("num_workers") or (int(sizes[-1]) if sizes else None)


def _steps(run: Run) -> str | None:
    points = run.points("loss")
    return f"{points[-1][0]:,}" if points else None


def _checkpoint_size(run: Run) -> str | None:
    return _size(run.checkpoint_bytes) if run.checkpoint_bytes is not None else None


def _checkpoint_wait(run: Run) -> str | None:
    """The time that training stood still for checkpoints, as a share of the time in steps."""
    waits, steps = run.values("checkpoint_wait_s"), run.values("step_time_s")
    return f"{sum(waits) / sum(steps):.1%}" if waits and steps else None


def _training_time(run: Run) -> str | None:
    """In steps and waiting for checkpoints, over all launches."""
    seconds = run.values("step_time_s") + run.values("checkpoint_wait_s")
    return human_time(sum(seconds)) if seconds else None


def _restarts(run: Run) -> int | None:
    return len(run.result["restarts"]) if "restarts" in run.result else None


FACTS: dict[str, Fact] = {
    "status": _status,
    "adapter": lambda run: run.config.get("adapter.kind"),
    "engine": lambda run: run.result.get("engine") or run.config.get("engine.kind"),
    "trainable parameters": _from_result("trainable_parameters", human_count),
    "workers": _workers,
    "steps": _steps,
    "tokens": _from_rows("tokens", sum, human_count),
    "peak memory a rank": _from_result("peak_memory_mib", lambda ranks: f"{max(ranks):,.0f} MiB"),
    "tokens/s, median": _from_rows("tokens_per_s", statistics.median, human_count),
    "training time": _training_time,
    "wall time, last launch": _from_result("wall_time_s", human_time),
    "last training loss": _from_rows("loss", _last, _loss),
    "last held-out loss": _from_rows("eval_loss", _last, _loss),
    "best held-out loss": _from_rows("eval_loss", min, _loss),
    "checkpoint": _checkpoint_size,
    "final": _from_result("final_bytes", _size),
    "waited for checkpoints": _checkpoint_wait,
    "restarts": _restarts,
}
OPTIONAL = ("waited for checkpoints",)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted key to its values in all runs, for each key that differs; null counts as not being there."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.name")
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {
        key: [_setting(run.config, key) for run in runs]
        for key, of_runs in values.items()
        if any(value != of_runs[0] for value in of_runs)
    }


def _setting(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, ABSENT)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def incomparable(runs: Sequence[Run], changed: Mapping[str, object]) -> list[str]:
    """Which of the keys that differ make the losses something else."""
    # The seed chooses the rows that are held out where they are a share of all.
    splits = any(run.config.get("data.eval.fraction") for run in runs)
    decide = (*DECIDE_THE_LOSS, "run.seed") if splits else DECIDE_THE_LOSS
    return [key for key in changed if key.startswith(decide) and key not in DECIDE_NOTHING]


def _print_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A column a run; side by side as many as the terminal has room for, the others below."""
    columns = list(zip(*rows, strict=True))
    label_width, *widths = (max(map(len, column)) for column in columns)
    widths = [min(WIDEST_CELL, max(width, len(name))) for width, name in zip(widths, names, strict=True)]
    for chosen in _groups(widths, out.width - label_width - 4):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        for index in chosen:
            table.add_column(names[index], overflow="fold")
        for row in rows:
            table.add_row(row[0], *(row[1 + index] for index in chosen))
        out.print(table, markup=False)


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of columns that fit side by side, at least one in each group."""
    groups: list[list[int]] = [[]]
    left = room
    for index, width in enumerate(widths):
        left -= width + 3
        if left < 0 and groups[-1]:
            groups.append([])
            left = room - width - 3
        groups[-1].append(index)
    return groups


# ------------------------------------------------------------------------------------------------ the curves


def drawing(runs: Sequence[Run], width: int) -> Text:
    """Losses over steps, in letters, so that it reads without its colours."""
    drawn = [run for run in runs if run.has_losses][: len(ascii_lowercase)]
    log = _wants_log_scale(runs)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plot_size(width, DRAWING_HEIGHT)
    plotext.yscale("log" if log else "linear")
    lettered = list(zip(ascii_lowercase, cycle(DRAWING_COLORS), drawn, strict=False))
    for letter, color, run in lettered:
        if curve := _thinned(run.points("loss"), width // 2):
            plotext.plot(*_axes(curve), marker=letter, color=color)
    for letter, color, run in lettered:
        if points := run.points("eval_loss"):
            plotext.scatter(*_axes(points), marker=letter.upper(), color=color)
    title = f"loss over steps{' (log scale)' * log}; small letters: training, capitals: held-out"
    legend = [f"  {plotext.colorize(letter, color)} {run.name}" for letter, color, run in lettered]
    left_out = [f"  not drawn: {run.name}" for run in runs if run not in drawn]
    return Text.from_ansi("\n".join((title, plotext.build().rstrip(), *legend, *left_out)))


def _axes(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _wants_log_scale(runs: Sequence[Run]) -> bool:
    """Where losses span more than a power of ten, the differences at the end would not be seen."""
    losses = [loss for run in runs for loss in run.values("loss") + run.values("eval_loss")]
    return min(losses) > 0 and max(losses) > 10 * min(losses)


def _thinned(points: Points, most: int) -> Points:
    """At most so many points, each the mean of some that follow one another."""
    size = max(1, math.ceil(len(points) / most))
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (statistics.fmean(x for x, _ in piece), statistics.fmean(y for _, y in piece)) for piece in pieces
    ]


def _smoothed(points: Points) -> Points:
    """The running mean over SMOOTHED_OVER of the points, ending at each."""
    size = max(1, round(len(points) * SMOOTHED_OVER))
    sums = [0.0, *accumulate(y for _, y in points)]
    starts = (max(0, end - size) for end in range(1, len(sums)))
    return [
        (x, (sums[end] - sums[start]) / (end - start))
        for end, (start, (x, _)) in enumerate(zip(starts, points, strict=True), 1)
    ]


def _check_plot(path: Path) -> None:
    """Before anything is read: whether there will be a plot."""
    if path.suffix.lower() not in PLOT_FORMATS:
        raise UserError(f"--plot {path}: the name must end with {' or '.join(PLOT_FORMATS)}.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: there is no such folder.")
    if path.exists():
        raise UserError(f"--plot {path}: is there already; choose another name.")


def _write_plot(runs: Sequence[Run], path: Path) -> None:
    """Loss over tokens, and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    over_tokens, over_seconds = figure.subplots(1, 2, sharey=True)
    _plot(over_tokens, runs, "tokens", [run.counted("tokens") for run in runs])
    seconds = [run.counted("step_time_s", "checkpoint_wait_s") for run in runs]
    _plot(over_seconds, runs, "seconds in steps and waiting for checkpoints", seconds)
    over_tokens.set_ylabel("loss (training: running mean)")
    figure.legend(*over_tokens.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"--plot {path}: can't be written: {error}") from error


def _plot(axes: Any, runs: Sequence[Run], label: str, x_of_step: Sequence[dict[float, float]]) -> None:
    """Curves of all runs, which colours tell apart, and line styles and markers where colours do not."""
    for index, (run, x_of) in enumerate(zip(runs, x_of_step, strict=True)):
        training, held_out = (
            [(x_of[step], loss) for step, loss in run.points(metric)] for metric in ("loss", "eval_loss")
        )
        color, style = f"C{index % 10}", LINE_STYLES[index % len(LINE_STYLES)]
        marker = MARKERS[index % len(MARKERS)]
        if curve := _thinned(_smoothed(training), PLOT_POINTS):
            axes.plot(*_axes(curve), color=color, linestyle=style, label=run.name)
        if held_out:
            axes.plot(
                *_axes(held_out), color=color, linestyle="", marker=marker, label=f"{run.name}, held-out"
            )
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    if _wants_log_scale(runs):
        axes.set_yscale("log")
