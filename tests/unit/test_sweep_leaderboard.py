"""The leaderboard of a sweep: its rows, its file, and what is printed."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.console import out
from raytune_ds.sweep import leaderboard
from raytune_ds.sweep.records import Goal, Report, Status, Trial

GOAL = Goal(("eval_loss",), ("min",))
LISTS = ["q_a_proj", "o_proj"]


def trial(
    number: int,
    losses: tuple[float | None, ...] = (),
    status: Status = "finished",
    values: dict[str, Any] | None = None,
    **more: Any,
) -> Trial:
    """Reports at every 10 of 40 steps."""
    reports = [
        Report(n, 10 * n, 40, 5000 * n, 30.5 * n, {"eval_loss": loss, "trainable_parameters": 331776})
        for n, loss in enumerate(losses, 1)
    ]
    found = {"train.learning_rate": 0.000314159, "adapter.r": 8} if values is None else values
    return Trial(number, found, status, tuple(reports), f"runs/{number:04d}", **more)


TRIALS = [
    trial(1, (3.0, 2.0, 2.5, 2.25)),
    trial(2, (2.0, 1.5, 1.25, 1.5), origin="trial 3, step 20"),
    trial(3, (4.0,), "stopped", reason="not among the best half, of 4"),
    trial(4, (1.0,), "failed", reason="out of memory"),
    trial(5, (), "running"),
]


def as_dicts(trials: list[Trial], goal: Goal = GOAL) -> list[dict[str, Any]]:
    columns, found = leaderboard.rows(trials, goal)
    return [dict(zip(columns, row, strict=True)) for row in found]


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


# ------------------------------------------------------------------------------------------------ rows


def test_a_row_says_all_that_is_known() -> None:
    """Numbers in full."""
    assert as_dicts(TRIALS)[0] == {
        "rank": 1,
        "trial": "0002",
        "status": "finished",
        "train.learning_rate": 0.000314159,
        "adapter.r": 8,
        "eval_loss": 1.5,
        "best_eval_loss": 1.25,
        "step": 40,
        "total_steps": 40,
        "reports": 4,
        "tokens": 20000,
        "seconds": 122.0,
        "trainable_parameters": 331776,
        "reason": None,
        "origin": "trial 3, step 20",
        "run": "runs/0002",
    }


def test_the_best_first_then_those_without_a_value_then_failed_ones() -> None:
    """A failed trial has no rank, however low its loss was."""
    found = [(row["rank"], row["trial"]) for row in as_dicts(TRIALS)]
    assert found == [(1, "0002"), (2, "0001"), (3, "0003"), (None, "0005"), (None, "0004")]


def test_the_best_value_is_the_largest_where_that_is_wanted() -> None:
    """And leaves out what is no number."""
    found = as_dicts([trial(1, (1.0, 3.0, math.nan, 2.0))], Goal(("eval_loss",), ("max",)))
    assert (found[0]["eval_loss"], found[0]["best_eval_loss"]) == (2.0, 3.0)


def test_each_searched_key_has_a_column_even_if_some_trials_lack_it() -> None:
    """In the order of the values."""
    columns, found = leaderboard.rows([trial(1, values={"b": 1, "a": 2}), trial(2, values={"c": 3})], GOAL)
    assert columns[3:6] == ["b", "a", "c"]
    assert [row[3:6] for row in found] == [[1, 2, None], [None, None, 3]]


def test_several_metrics_have_a_column_each_and_a_front() -> None:
    """One that is a column anyway is not there twice."""
    goal = Goal(("eval_loss", "trainable_parameters"), ("min", "min"))
    columns, _ = leaderboard.rows(TRIALS, goal)
    assert len(columns) == len(set(columns))
    assert columns[5:8] == ["eval_loss", "trainable_parameters", "best_eval_loss"]
    assert {row["trial"]: row["pareto"] for row in as_dicts(TRIALS, goal)} == {
        "0001": False,
        "0002": True,
        "0003": False,
        "0004": False,
        "0005": False,
    }
    assert "pareto" not in leaderboard.rows(TRIALS, GOAL)[0]


def test_no_trials_have_columns_all_the_same() -> None:
    """The file has a heading."""
    columns, found = leaderboard.rows([], GOAL)
    assert columns[:4] == ["rank", "trial", "status", "eval_loss"]
    assert found == []


# ------------------------------------------------------------------------------------------------ the file


def test_the_file_holds_values_that_read_back(tmp_path: Path) -> None:
    """Commas, quotes and lines in text, lists and truth values as JSON, nothing for what is not known."""
    path = tmp_path / "deep" / "leaderboard.csv"
    values = {"adapter.targets": LISTS, "model.name": 'a, "b"\n中', "adapter.dora": True, "train.decay": None}
    leaderboard.write_csv(str(path), [trial(1, (2.0, None), values=values)], GOAL)
    (row,) = read_csv(path)
    assert row["adapter.targets"] == '["q_a_proj", "o_proj"]'
    assert row["model.name"] == 'a, "b"\n中'
    assert (row["adapter.dora"], row["train.decay"]) == ("true", "")
    assert (row["eval_loss"], row["best_eval_loss"], row["rank"], row["reason"]) == ("", "2.0", "", "")


def test_the_file_holds_numbers_in_full(tmp_path: Path) -> None:
    """What is printed is shorter."""
    leaderboard.write_csv(str(tmp_path / "l.csv"), TRIALS, GOAL)
    assert [row["train.learning_rate"] for row in read_csv(tmp_path / "l.csv")] == ["0.000314159"] * 5


def test_the_file_may_lie_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """Any storage will do."""
    leaderboard.write_csv(f"{bucket}/leaderboard.csv", TRIALS, GOAL)
    found = read_csv(tmp_path / "bucket" / "runs" / "leaderboard.csv")
    assert [row["trial"] for row in found] == ["0002", "0001", "0003", "0005", "0004"]


# ------------------------------------------------------------------------------------------------ the terminal


def shown(capsys: pytest.CaptureFixture[str], trials: list[Trial], goal: Goal = GOAL, **more: int) -> str:
    leaderboard.show(trials, goal, **more)
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda columns: monkeypatch.setattr(out, "_width", columns)


def test_printed_numbers_are_short(capsys: pytest.CaptureFixture[str], width: Any) -> None:
    """With the step of all, and units."""
    width(130)
    text = shown(capsys, TRIALS)
    assert "5 trials, by eval_loss (min)" in text
    lines = [cells(line) for line in text.splitlines() if line.startswith("│")]
    assert lines[0] == ["1", "0002", "finished", "3.1e-04", "8", "1.5000", "40/40", "20k", "2m02s"]
    assert lines[3] == ["-", "0005", "running", "3.1e-04", "8", "-", "-", "-", "-"]
    assert lines[4][:3] == ["-", "0004", "failed"]


def test_only_the_best_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """And how many there are."""
    text = shown(capsys, [trial(n, (float(n),)) for n in range(1, 30)], most=3)
    assert "the best 3 of 29 trials" in text
    assert [cells(line)[1] for line in text.splitlines() if line.startswith("│")] == ["0001", "0002", "0003"]


def test_a_narrow_terminal_gets_fewer_columns_and_whole_ones(
    capsys: pytest.CaptureFixture[str], width: Any
) -> None:
    """The settings and the metric stay."""
    width(80)
    values = {"train.learning_rate": 1e-4, "adapter.dropout": 0.05, "adapter.targets": LISTS, "adapter.r": 16}
    text = shown(capsys, [trial(1, (1.5,), values=values)])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for part in ("1.0e-04", "0.05", "[q_a_proj, o_proj]", "16", "1.5000", "0001"):
        assert part in text
    assert "tokens" not in text


def test_keys_that_end_alike_or_like_a_column_are_printed_in_full(
    capsys: pytest.CaptureFixture[str], width: Any
) -> None:
    """No column hides another."""
    width(200)
    text = shown(capsys, [trial(1, (1.5,), values={"a.r": 41, "b.r": 42, "adapter.rank": 43, "b.k": 44})])
    (line,) = [line for line in text.splitlines() if line.startswith("│")]
    assert cells(line)[:7] == ["1", "0001", "finished", "41", "42", "43", "44"]
    heading = "".join(text.splitlines()[1:5])
    for name in ("a.r", "b.r", "rank", "k"):
        assert f" {name} " in heading


def test_no_trials_are_printed_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fails."""
    assert "0 trials" in shown(capsys, [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "true"),
        (16, "16"),
        (0.0, "0"),
        (0.125, "0.125"),
        (0.00031416, "3.1e-04"),
        (-0.00031416, "-3.1e-04"),
        (0.0031416, "0.00314"),
        (123456.0, "1.23e+05"),
        ("auto", "auto"),
        (["a", 0.00031416, ["b"]], "[a, 3.1e-04, [b]]"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_short_values(value: object, text: str) -> None:
    """As a person would write them."""
    assert leaderboard.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1.23456, "1.2346"), (-0.5, "-0.5000"), (153.26, "153.3"), (331776.0, "332k")],
)
def test_short_metrics(value: float | None, text: str) -> None:
    """Losses to four digits, counts in units."""
    assert leaderboard.short_metric(value) == text


def test_it_loads_no_heavy_library() -> None:
    """Neither for a table nor for a report are they needed."""
    code = (
        "import sys\nimport raytune_ds.sweep.leaderboard, raytune_ds.sweep.report\n"
        "print(*[m for m in ('torch', 'ray', 'transformers', 'optuna', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
