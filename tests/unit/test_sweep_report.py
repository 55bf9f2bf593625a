"""The report of a sweep: one page that needs nothing else, whatever became of the trials."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.sweep import influence, plots
from raytune_ds.sweep.influence import importance, parallel
from raytune_ds.sweep.plots import Plot
from raytune_ds.sweep.records import Goal, Report, Status, Trial
from raytune_ds.sweep.report import write_report

LOSS = Goal(("eval_loss",), ("min",))
BOTH = Goal(("eval_loss", "trainable_parameters"), ("min", "min"))
TARGETS = ("auto", ["q_a_proj", "o_proj"])
EVIL = "</script><script>alert(1)</script><img src=http://x.invalid/a.png onerror=alert(2)><b>\"'&amp;%{x}"
HEADINGS = [
    "Leaderboard",
    "eval_loss over tokens",
    "Settings and what came of them",
    "Which settings matter",
    "How far each trial came",
    "What each trial cost",
]


def trial(
    number: int,
    losses: Sequence[float | None],
    status: Status = "finished",
    values: dict[str, Any] | None = None,
    reason: str | None = None,
    parameters: float | None = None,
) -> Trial:
    """A report at every 20 of 80 steps."""
    reports = [
        Report(n, 20 * n, 80, 4000 * n, 60.0 * n, {"eval_loss": loss, "trainable_parameters": parameters})
        for n, loss in enumerate(losses, 1)
    ]
    found = {"train.learning_rate": 10.0**-number} if values is None else values
    return Trial(number, found, status, tuple(reports), f"runs/{number:04d}", reason)


def sweep(count: int = 16) -> list[Trial]:
    """The learning rate decides, a little the rank; three quarters are stopped, one fails."""
    source = random.Random(0)
    trials = []
    for number in range(1, count + 1):
        rate, rank = 10 ** source.uniform(-5, -2), source.choice([4, 8, 16, 32])
        values = {
            "adapter.r": rank,
            "train.learning_rate": rate,
            "adapter.dropout": source.uniform(0, 0.2),
            "adapter.targets": source.choice(TARGETS),
        }
        loss = 1.5 + 0.3 * (math.log10(rate) + 3.5) ** 2 - 0.01 * math.log2(rank)
        status: Status = "failed" if number == 5 else "stopped" if number % 4 else "finished"
        done = 4 if status == "finished" else 1 + number % 3
        reason = None if status == "finished" else f"reason {number}"
        trials.append(
            trial(number, [loss + 1 / n for n in range(1, done + 1)], status, values, reason, 1000.0 * rank)
        )
    return trials


class Page(HTMLParser):
    """Tags with their attributes, the text outside of scripts and styles, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.headings: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style" and data.strip():
            self.texts.append(data.strip())
            if self._inside == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def drawn(self) -> list[str]:
        """The names of the plots."""
        return [str(attrs["id"]) for _, attrs in self.tags if attrs.get("class") == "plotly-graph-div"]

    def column(self, title: str) -> list[str]:
        """The keys by which a column of the leaderboard is sorted."""
        titles = [found.replace("\n", "") for found in self._titles()]
        cells = [str(attrs["data-key"]) for tag, attrs in self.tags if tag == "td"]
        return cells[titles.index(title) :: len(titles)]

    def _titles(self) -> list[str]:
        start = self.texts.index("rank")
        count = sum(tag == "th" for tag, _ in self.tags)
        titles, parts = [], self.texts[start:]
        for part in parts:
            if titles and titles[-1].endswith((".", "_")):
                titles[-1] += part
            elif len(titles) < count:
                titles.append(part)
            else:
                break
        return titles


Write = Callable[..., Page]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report and reads it."""

    def written(
        trials: Sequence[Trial],
        goal: Goal = LOSS,
        facts: dict[str, str] | None = None,
        price: float | None = None,
    ) -> Page:
        path = tmp_path / "report.html"
        write_report(str(path), trials, goal, facts or {}, price)
        return Page(path.read_text(encoding="utf-8"))

    return written


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_needs_nothing_else(write: Write) -> None:
    """No link, no address, and a policy that would refuse them."""
    page = write(sweep(), BOTH, {"sweep": "news"}, 1.2)
    assert not [tag for tag, attrs in page.tags if {"src", "href", "srcset", "action", "data"} & attrs.keys()]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "img", "object", "a", "base")]
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert [str(policy).split(";")[0] for policy in policies] == ["default-src 'none'"]


def test_plotly_is_there_once_and_the_file_is_small(write: Write, tmp_path: Path) -> None:
    """All plots share it."""
    page = write(sweep(), BOTH)
    assert page.drawn == ["curves", "pareto-1", "parallel", "importance", "stops", "costs"]
    assert len([script for script in page.scripts if len(script) > 1e6]) == 1
    assert (tmp_path / "report.html").stat().st_size < 6e6


def test_all_trials_are_in_the_leaderboard_the_best_first(write: Write) -> None:
    """By number, rank and loss, with a class for the status."""
    trials = sweep()
    page = write(trials)
    assert sorted(map(int, page.column("trial"))) == list(range(1, 17))
    losses = [float(key) for key in page.column("eval_loss")]
    assert losses[:15] == sorted(losses[:15])
    assert page.column("rank") == [*map(str, range(1, 16)), ""]
    assert page.column("trial")[-1] == "5"
    assert sum(attrs.get("class") == "status stopped" for _, attrs in page.tags) == 11
    rows = [str(attrs.get("class", "")).split() for tag, attrs in page.tags if tag == "tr"][1:]
    assert ["best" in row for row in rows] == [True] + [False] * 15


def test_each_plot_knows_all_trials_with_something_to_draw(write: Write) -> None:
    """By name, in what is drawn."""
    figures = "".join(
        script for script in write(sweep()).scripts if "Plotly.newPlot" in script and len(script) < 1e6
    )
    for number in range(1, 17):
        assert f'"name":"{number:04d}"' in figures
        assert figures.count(f"trial {number:04d}\\u003c") >= (3 if number == 5 else 4)


def test_the_headline_names_the_best_its_values_and_the_median(write: Write) -> None:
    """As a sentence."""
    losses = {1: 2.0, 2: 1.5, 3: 3.0}
    page = write([trial(n, [loss], values={"adapter.r": n}) for n, loss in losses.items()])
    assert (
        "Trial 0002 is best: eval_loss 1.5000, 0.5000 (25.0%) below the median of 3 trials (2.0000)."
        in page.text
    )
    assert "adapter.r = 2" in page.text


def test_the_headline_of_a_metric_that_should_be_high(write: Write) -> None:
    """Above the median; and more may come."""
    trials = [trial(1, [1.0]), trial(2, [3.0]), trial(3, [2.0], "running")]
    assert (
        "Trial 0002 is best so far: eval_loss 3.0000, 1.0000 (50.0%) above the median"
        in write(trials, Goal(("eval_loss",), ("max",))).text
    )


def test_totals_and_money(write: Write) -> None:
    """Money only where the price is known."""
    trials = [trial(1, [2.0] * 4), trial(2, [2.0], "stopped", reason="why"), trial(3, [], "failed")]
    priced = write(trials, price=36.0)
    assert (
        "3 trials · 1 finished · 1 stopped · 1 failed · 20k tokens · 5m00s of training · 3.00 US dollars"
        in priced.text
    )
    assert "4m00s, $2.40" in "".join(priced.scripts)
    assert "US $" in priced.texts
    free = write(trials)
    assert "US dollars" not in free.text
    assert "US $" not in free.texts


def test_facts_are_shown_as_they_are(write: Write) -> None:
    """The name of the sweep is the title."""
    page = write(sweep(4), facts={"sweep": "news", "model": "tiny:llama", "scheduler": "ASHA <3"})
    assert page.texts.count("Sweep news") == 2
    assert page.texts[page.texts.index("scheduler") + 1] == "ASHA <3"
    assert write(sweep(4)).texts.count("Sweep") == 2


def test_what_was_stopped_and_why(write: Write) -> None:
    """What it spared: 3 of 4 quarters of 4000 tokens and of a minute each."""
    page = write(
        [trial(1, [1.0] * 4), trial(2, [2.0], "stopped", reason="below the median"), trial(3, [], "failed")]
    )
    assert (
        "1 trial was stopped early; going on to the end would have taken another 12k tokens and 3m00s."
        in page.text
    )
    assert "Why 1 trial ended early" in page.texts
    assert "stopped: below the median" in page.texts


def test_html_in_any_text_stays_text(write: Write) -> None:
    """In values, keys, facts, reasons and metrics; in the table and in what plotly draws."""
    trials = [
        trial(
            n,
            [float(n)],
            values={EVIL: f"{EVIL}{n}", "list": [EVIL, n], "adapter.r": n},
            reason=f"{EVIL} {n}",
        )
        for n in range(1, 7)
    ]
    goal = Goal(("eval_loss", EVIL), ("min", "max"))
    page = write(trials, goal, {"sweep": EVIL, EVIL: EVIL})
    usual = write(sweep(6), BOTH)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in usual.tags}
    assert len(page.scripts) <= len(usual.scripts)
    assert f"Sweep {EVIL}" in page.texts
    assert f"finished: {EVIL} 1" in page.texts
    drawn = "".join(script for script in page.scripts if "Plotly.newPlot" in script and len(script) < 1e6)
    assert "&lt;b&gt;" in drawn.replace("\\u0026", "&")
    assert not re.search(r"<img|\\u003cimg", drawn)


def test_a_report_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """Any storage will do."""
    write_report(f"{bucket}/report.html", sweep(4), LOSS, {})
    assert (tmp_path / "bucket" / "runs" / "report.html").stat().st_size > 1e6


def test_the_same_sweep_makes_the_same_report(tmp_path: Path) -> None:
    """Nothing in it is drawn by chance."""
    for name in ("a", "b"):
        write_report(str(tmp_path / name), sweep(), BOTH, {"sweep": "news"}, 1.0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ------------------------------------------------------------------------------------------------ little to show


@pytest.mark.parametrize(
    ("trials", "drawn", "sentence"),
    [
        ([], [], "There are no trials."),
        ([trial(1, [])], [], "no trial has reported eval_loss."),
        ([trial(1, [2.0])], ["curves", "stops", "costs"], "No other trial has a value to compare it with."),
        (
            [trial(n, [], "failed", reason="boom") for n in (1, 2)],
            [],
            "No trial that did not fail has a value of eval_loss.",
        ),
        (
            [trial(n, [2.0], "failed") for n in (1, 2)],
            ["curves", "stops", "costs"],
            "There is nothing to compare: no trial has a value of eval_loss.",
        ),
        (
            [trial(n, [1.0 * n]) for n in range(1, 8)],
            ["curves", "parallel", "stops", "costs"],
            "Only train.learning_rate differs between the trials",
        ),
        (
            [trial(n, [1.0 * n], values={"a": 1, "b": [1]}) for n in range(1, 8)],
            ["curves", "stops", "costs"],
            "All trials with a value have the same settings.",
        ),
        (
            [trial(n, [2.0], values={"a": n, "b": -n}) for n in range(1, 8)],
            ["curves", "parallel", "stops", "costs"],
            "All trials have the same eval_loss, so no setting made a difference.",
        ),
        (
            [trial(n, [None, math.nan, math.inf]) for n in range(1, 8)],
            ["stops", "costs"],
            "There is nothing to draw: no trial has reported eval_loss.",
        ),
        (
            [trial(n, [1.0 * n], values={}) for n in range(1, 8)],
            ["curves", "stops", "costs"],
            "same settings",
        ),
        (
            [trial(1, [2.0, None]), trial(2, [1.0]), trial(3, [1.5])],
            ["curves", "parallel", "stops", "costs"],
            "This takes at least 5 trials with a value of eval_loss; there are 2.",
        ),
    ],
)
def test_a_sentence_stands_where_there_is_nothing_to_draw(
    write: Write, trials: list[Trial], drawn: list[str], sentence: str
) -> None:
    """Every section is there, whatever became of the trials."""
    page = write(trials, price=1.0)
    assert page.drawn == drawn
    assert page.headings == HEADINGS
    assert sentence in page.text
    assert any(len(script) > 1e6 for script in page.scripts) == bool(drawn)


def test_a_front_of_too_few_points(write: Write) -> None:
    """A trial without the second metric is no point."""
    page = write([trial(1, [1.0], parameters=10.0), trial(2, [2.0])], BOTH)
    assert "pareto-1" not in page.drawn
    assert "fewer than two trials have a value of both" in page.text


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_trials_are_like_there_is_a_report(write: Write, seed: int) -> None:
    """Values of mixed kinds, keys that are missing, metrics of any size or none."""
    source = random.Random(seed)
    kinds: list[Callable[[], Any]] = [
        lambda: source.choice([1, 2.5, None, "a", [1], True, math.nan]),
        lambda: 10 ** source.uniform(-9, 9),
        lambda: source.choice([0, -1e9, 1e300, 5e-324]),
        lambda: source.randint(-5, 5),
        lambda: source.choice([True, False]),
    ]
    numbers = [
        lambda: source.uniform(-1, 1),
        lambda: 10 ** source.uniform(-300, 300),
        lambda: source.choice([None, 1.0]),
    ]
    number, statuses = source.choice(numbers), ("finished", "stopped", "failed", "running")
    trials = [
        trial(
            n,
            [number() for _ in range(source.randint(0, 4))],
            source.choice(statuses),
            {f"k.{i}": kind() for i, kind in enumerate(kinds) if source.random() < 0.9},
            source.choice([None, "why"]),
            number(),
        )
        for n in range(1, source.choice([3, 12, 60]))
    ]
    goal = Goal(BOTH.metrics, (source.choice(["min", "max"]), source.choice(["min", "max"])))
    assert write(trials, goal, price=2.0).headings[0] == "Leaderboard"


# ------------------------------------------------------------------------------------------------ figures


def figure(plot: Plot) -> dict[str, Any]:
    """What plotly would be given."""
    assert plot.figure is not None
    return dict(json.loads(plot.figure.to_json()))


def test_curves_have_gaps_where_there_is_no_number() -> None:
    """And one that diverged does not flatten the others."""
    drawn = figure(plots.curves([trial(1, [2.0, None, 1.0]), trial(2, [1000.0, math.inf])], LOSS))
    curves = {trace["name"]: trace["y"] for trace in drawn["data"]}
    assert curves == {"0001": [2.0, None, 1.0], "0002": [1000.0, None]}
    assert drawn["layout"]["yaxis"]["type"] == "log"


def test_the_best_curve_stands_out_and_stopped_ones_do_not() -> None:
    """It is drawn last and thickest."""
    drawn = figure(plots.curves([trial(2, [1.0]), trial(1, [2.0]), trial(3, [3.0], "stopped")], LOSS))["data"]
    assert [trace["name"] for trace in drawn] == ["0003", "0001", "0002"]
    assert drawn[-1]["line"]["color"] == plots.BEST_COLOR
    assert drawn[0]["line"]["color"] == plots.STATUS_COLORS["stopped"]
    assert drawn[-1]["line"]["width"] > max(trace["line"]["width"] for trace in drawn[:-1])


def test_bars_are_as_long_as_the_share_that_was_done() -> None:
    """One for each trial that began, coloured by status."""
    trials = [trial(1, [1.0] * 4), trial(2, [2.0], "stopped", reason="too slow"), trial(3, [], "failed")]
    _, bars = figure(plots.stops(trials, LOSS))["data"]
    assert (bars["y"], bars["x"]) == (["0001", "0002"], [1.0, 0.25])
    assert bars["marker"]["color"][1] == plots.STATUS_COLORS["stopped"]
    assert "too slow" in bars["hovertext"][1]


def test_the_pareto_plot_names_the_front() -> None:
    """A line in steps joins it."""
    points = {1: (1.0, 30.0), 2: (2.0, 10.0), 3: (2.5, 40.0)}
    trials = [trial(n, [loss], parameters=count) for n, (loss, count) in points.items()]
    line, dots = figure(plots.pareto(trials, BOTH, "trainable_parameters"))["data"]
    assert dots["text"] == ["0001", "0002", ""]
    assert (line["x"], line["y"], line["line"]["shape"]) == ([10.0, 30.0], [2.0, 1.0], "hv")


def ticks(plot: Plot, column: int) -> list[tuple[float, str]]:
    """Height and text of those at an axis."""
    found = figure(plot)["layout"]["annotations"]
    return [(round(tick["y"], 3), tick["text"]) for tick in found if tick["x"] == column]


def test_axes_of_parallel_coordinates_fit_their_values() -> None:
    """A choice has its values as ticks, a wide range is logarithmic, text is in order."""
    rates = [1e-5, 2e-5, 1e-4, 2e-4, 1e-3, 2e-3, 1e-2]
    trials = [
        trial(
            n, [1.0 * n], values={"r": 2 ** (2 + n % 4), "lr": rate, "drop": 0.02 * n, "to": TARGETS[n % 2]}
        )
        for n, rate in enumerate(rates, 1)
    ]
    plot = parallel(trials, LOSS)
    assert ticks(plot, 0) == [(0.0, "4"), (0.333, "8"), (0.667, "16"), (1.0, "32")]
    assert (0.0, "1.0e-05") in ticks(plot, 1)
    assert (0.333, "1.0e-04") in ticks(plot, 1)
    assert [text for _, text in ticks(plot, 2)] == ["0.02", "0.04", "0.06", "0.08", "0.1", "0.12", "0.14"]
    assert ticks(plot, 3) == [(0.0, "[q_a_proj, o_proj]"), (1.0, "auto")]


def test_a_setting_that_is_the_same_in_all_is_told_not_drawn() -> None:
    """Its axis would say nothing."""
    plot = parallel([trial(n, [1.0 * n], values={"a": n, "b": [1, 2]}) for n in (1, 2)], LOSS)
    assert "The same in all: b = [1, 2]." in plot.caption
    assert figure(plot)["layout"]["xaxis"]["ticktext"] == ["<b>a</b>", "<b>eval_loss</b>"]


@pytest.mark.parametrize("has_sklearn", [True, False])
def test_importance_finds_the_setting_that_decides(
    monkeypatch: pytest.MonkeyPatch, has_sklearn: bool
) -> None:
    """With scikit-learn and without it; its caption says what counts, and how."""
    if not has_sklearn:
        monkeypatch.setattr(influence, "find_spec", lambda _: None)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        plot = importance(sweep(24), LOSS)
    (bars,) = figure(plot)["data"]
    assert bars["y"][0] == "train.learning_rate"
    assert sum(bars["x"]) == pytest.approx(1)
    assert ("fANOVA" in plot.caption) == has_sklearn
    assert "stopped ones with the value they were stopped at" in plot.caption
    assert not [warning for warning in heard if "optuna" in str(warning.filename)]


def test_importance_counts_the_newest_report() -> None:
    """Not the best one, by which the other setting would decide."""
    trials = []
    for n in range(16):
        first, last = n % 4, n // 4
        trials.append(trial(n + 1, [-100.0 * first, 1.0 * last], values={"of.first": first, "of.last": last}))
    (bars,) = figure(importance(trials, LOSS))["data"]
    assert dict(zip(bars["y"], bars["x"], strict=True))["of.last"] > 0.8
