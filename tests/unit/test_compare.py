"""Runs side by side: what is read from their directories, what is printed and drawn, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raytune_ds import cli, compare, storage
from raytune_ds.compare import Run, differences, facts, incomparable, read_runs
from raytune_ds.compose import dump
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from tests.helpers import write_jsonl

Make = Callable[..., Path]

RESULT = {
    "status": "finished",
    "progress": {"step": 4},
    "wall_time_s": 84.6,
    "num_workers": 2,
    "engine": "ddp",
    "trainable_parameters": 331776,
    "peak_memory_mib": [687.6, 689.9],
    "final_bytes": 3 << 19,
    "restarts": ["worker 1 died"],
    "error": None,
}


def step_row(step: int, tokens_per_s: float) -> dict[str, Any]:
    times = {"step_time_s": 2.0, "tokens_per_s": tokens_per_s, "world_size": 2}
    return {"step": step, "loss": 8.0 / step, "tokens": 1000, **times}


ROWS = [
    {"step": 0, "eval_loss": 8.0},
    step_row(1, 10.0),
    step_row(2, 500.0),
    step_row(3, 700.0),
    {"step": 3, "eval_loss": 2.5},
    step_row(4, 900.0),
    {"step": 4, "eval_loss": 2.75},
]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run directory of 4 steps; every part of it can be another one, or missing."""

    def make_run(
        name: str,
        config: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = ROWS,
        result: dict[str, Any] | None = RESULT,
        checkpoints: tuple[int, ...] = (),
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(dump(Config.model_validate(config or {})))
        if rows is not None:
            write_jsonl(path / "metrics.jsonl", rows)
        if result is not None:
            (path / "result.json").write_text(json.dumps(result))
        for step in checkpoints:
            write_checkpoint(path, step, [{"name": "a", "size": step << 20}, {"name": "b", "size": 1 << 19}])
        return path

    return make_run


def write_checkpoint(run: Path, step: int, files: list[dict[str, Any]] | None) -> None:
    """A checkpoint directory; without `files` one that was not finished."""
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    if files is not None:
        (path / "manifest.json").write_text(json.dumps({"step": step, "files": files}))


def read(*paths: Path) -> list[Run]:
    return read_runs([str(path) for path in paths])


def facts_of(*paths: Path) -> dict[str, list[str]]:
    """The table's rows by their label."""
    return {label: values for label, *values in facts(read(*paths))}


# ---------------------------------------------------------------------------------------------- the table


def test_facts_of_a_finished_and_an_unfinished_run(make: Make) -> None:
    """What is known of a run that goes on is shown, the rest as a dash."""
    finished = make("lora", checkpoints=(2, 4))
    goes_on = make("full", {"adapter": {"kind": "none"}}, rows=ROWS[1:3], result=None)
    assert facts_of(finished, goes_on) == {
        "status": ["finished", "unfinished"],
        "adapter": ["lora", "none"],
        "engine": ["ddp", "auto"],
        "trainable parameters": ["332k", "-"],
        "workers": ["2", "2"],
        "steps": ["4", "2"],
        "tokens": ["4,000", "2,000"],
        "peak memory a rank": ["690 MiB", "-"],
        "tokens/s, median": ["600", "255"],
        "training time": ["8s", "4s"],
        "wall time, last launch": ["1m25s", "-"],
        "last training loss": ["2.0000", "4.0000"],
        "last held-out loss": ["2.7500", "-"],
        "best held-out loss": ["2.5000", "-"],
        "checkpoint": ["4.5 MiB", "-"],
        "final": ["1.5 MiB", "-"],
        "restarts": ["1", "-"],
    }


def test_a_run_that_has_only_begun(make: Make) -> None:
    """A config is enough to be one."""
    table = facts_of(make("a"), make("b", rows=None, result=None))
    assert {values[1] for values in table.values()} == {"unfinished", "lora", "auto", "-"}


def test_a_failed_run_has_no_zeros(make: Make) -> None:
    """result.json says 0 where nothing is known."""
    nothing = {"trainable_parameters": 0, "peak_memory_mib": [], "final_bytes": 0, "progress": {}}
    table = facts_of(make("a"), make("b", result={**RESULT, **nothing, "status": "failed"}))
    assert table["status"] == ["finished", "failed"]
    assert table["steps"][1] == "4"
    for label in ("trainable parameters", "peak memory a rank", "final"):
        assert table[label][1] == "-"


def test_the_newest_complete_checkpoint_counts(make: Make) -> None:
    """Not one in the making, nor one whose manifest is damaged."""
    run = make("a", checkpoints=(1, 2))
    write_checkpoint(run, 3, None)
    write_checkpoint(run, 4, [{"name": "no size"}])
    assert facts_of(run, make("b"))["checkpoint"] == ["2.5 MiB", "-"]


def test_waiting_for_checkpoints_is_shown_where_it_was_measured(make: Make) -> None:
    """As a share of the step time; no row if no run has it."""
    waits = [{"step": 2, "checkpoint_wait_s": 0.5}, {"step": 4, "checkpoint_wait_s": 0.3}]
    measured, other, third = make("a", rows=ROWS + waits), make("b"), make("c")
    assert facts_of(measured, other)["waited for checkpoints"] == ["10.0%", "-"]
    assert "waited for checkpoints" not in facts_of(other, third)


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_skipped_step_has_no_loss(make: Make, loss: float | None) -> None:
    """It is null in metrics.jsonl; the last finite one is shown."""
    rows = [*ROWS, {"step": 5, "loss": loss, "tokens": 1000, "tokens_per_s": 1000.0}]
    assert facts_of(make("a", rows=rows, result=None), make("b"))["last training loss"] == [
        "2.0000",
        "2.0000",
    ]


def test_names_are_as_short_as_they_can_be_told_apart(make: Make) -> None:
    """The last part, and more of those that are equal."""
    paths = [make(name) for name in ("x/lora", "y/lora", "deep/y/lora", "full")]
    assert [run.name for run in read(*paths)][0::3] == ["x/lora", "full"]
    assert len({run.name for run in read(*paths)}) == 4


def test_a_run_named_twice_counts_once(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However it is written."""
    make("a")
    make("b")
    monkeypatch.chdir(tmp_path)
    assert [run.name for run in read_runs(["a", "b/", str(tmp_path / "a"), "./a"])] == ["a", "b"]


def test_runs_on_an_object_store(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any storage will do."""
    make("bucket/a", checkpoints=(1,))
    local = storage.open_filesystem

    def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
        if not path.startswith("mock://"):
            return local(path)
        tree = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        return tree, path.removeprefix("mock://")

    monkeypatch.setattr(storage, "open_filesystem", open_filesystem)
    runs = read_runs(["mock://bucket/a", str(make("b"))])
    assert [run.checkpoint_bytes for run in runs] == [3 << 19, None]
    assert [len(run.rows) for run in runs] == [len(ROWS)] * 2


# ----------------------------------------------------------------------------------------------- settings


def test_settings_that_differ(make: Make) -> None:
    """By dotted keys, those of a source too; not the name."""
    runs = read(
        make("a", {"run": {"name": "a"}, "data": {"sources": [{"path": "x.jsonl"}, {"path": "[ab].txt"}]}}),
        make("b", {"run": {"name": "b"}, "adapter": {"r": 16}, "data": {"sources": [{"path": "x.jsonl"}]}}),
    )
    assert differences(runs) == {
        "adapter.r": ["8", "16"],
        "data.sources.1.path": ["[ab].txt", "-"],
        "data.sources.1.format": ["auto", "-"],
    }


def test_a_key_that_an_older_run_has_not_is_null(make: Make) -> None:
    """A setting that came later is no difference while it is not set."""
    run = make("a")
    old = json.loads((run / "config.json").read_text())
    del old["train"]["max_steps"], old["train"]["global_batch"]
    (run / "config.json").write_text(json.dumps(old))
    changed = differences(read(run, make("b")))
    assert changed == {"train.global_batch": ["-", str(Config().train.global_batch)]}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({"train": {"learning_rate": 1e-3}, "adapter": {"r": 2}}, []),
        ({"data": {"prepare_memory_mib": 32}}, []),
        ({"data": {"seq_len": 64}}, ["data.seq_len"]),
        ({"data": {"sources": [{"path": "other.jsonl"}]}}, ["data.sources.0.path", "data.sources.0.format"]),
        ({"model": {"name": "tiny:llama"}}, ["model.name"]),
        ({"run": {"seed": 1}, "data": {"eval": {"fraction": 0.1}}}, ["run.seed", "data.eval.fraction"]),
        (
            {"run": {"seed": 1}, "data": {"eval": {"fraction": 0.0, "sources": [{"path": "e.jsonl"}]}}},
            ["data.eval.sources.0.path", "data.eval.sources.0.format"],
        ),
    ],
)
def test_other_data_or_another_model_make_losses_incomparable(
    make: Make, config: dict[str, Any], keys: list[str]
) -> None:
    """Which keys do; the seed only where it chooses the held-out rows."""
    held_out_fraction = config.get("data", {}).get("eval", {}).get("fraction")
    base = {} if held_out_fraction != 0.0 else {"data": {"eval": {"fraction": 0.0}}}
    runs = read(make("a", base), make("b", config))
    assert incomparable(runs, differences(runs)) == keys


# ------------------------------------------------------------------------------------------------- output


def test_output_reads_in_a_pipe_of_80_columns(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """No escape codes, nothing wider or cut off, and a letter for each run's curves."""
    path = "/a/long/path/to/a/data/set/that/does/not/fit/into/a/column/of/a/table.jsonl"
    data = {"sources": [{"path": path}], "eval": {"fraction": 0.0, "sources": [{"path": "e.jsonl"}]}}
    paths = [make("a-rather-long-name-" + "x" * 30, {"data": data})]
    paths += [make(f"run-{number}", {"adapter": {"r": number}}) for number in range(1, 7)]
    assert cli.main(["compare", *map(str, paths)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "…" not in text
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 80 and "not comparable" not in line] == []
    first_column = "".join(line.split("│")[2].strip() for line in lines if line.count("│") > 2)
    assert path in first_column
    for number in range(1, 7):
        assert f"  {'bcdefg'[number - 1]} run-{number}" in lines
    assert "not comparable, because these differ: data.sources.0.path" in text


def test_columns_side_by_side() -> None:
    """As many as fit, and one that is wider than the room by itself."""
    assert compare._groups([5, 5, 5, 5], 24) == [[0, 1, 2], [3]]
    assert compare._groups([50, 5, 50], 24) == [[0], [1], [2]]


def drawn_lines(*paths: Path) -> list[str]:
    """The inside of the drawing."""
    lines = compare.drawing(read(*paths), 80).plain.splitlines()
    return [line.partition("┤")[2] or line.partition("│")[2] for line in lines if line.endswith("│")]


def test_curves_are_drawn_where_the_losses_are(make: Make) -> None:
    """The lower one lower, training in small letters, held-out in capitals."""

    def rows(loss: float) -> list[dict[str, Any]]:
        steps = [{"step": step, "loss": loss} for step in range(1, 500)]
        return [*steps, {"step": 499, "eval_loss": loss / 2}]

    lines = drawn_lines(make("high", rows=rows(4.0), result=None), make("low", rows=rows(3.0), result=None))
    place = {letter: [n for n, line in enumerate(lines) if letter in line] for letter in "abAB"}
    assert [len(found) for found in place.values()] == [1, 1, 1, 1]
    assert place["a"] < place["b"] < place["A"] < place["B"]
    assert lines[place["a"][0]].count("a") > 70
    assert lines[place["A"][0]].strip(" │") == "A"
    assert lines[place["A"][0]].rstrip("│").endswith("A")


def test_small_differences_show_on_a_log_scale(make: Make) -> None:
    """0.1 and 0.2 are far apart below 10."""

    def rows(last: float) -> list[dict[str, Any]]:
        return [{"step": 1, "loss": 10.0}, *({"step": step, "loss": last} for step in range(2, 100))]

    a, b = make("a", rows=rows(0.2), result=None), make("b", rows=rows(0.1), result=None)
    lines = drawn_lines(a, b)
    rows_of = [max(n for n, line in enumerate(lines) if letter in line) for letter in "ab"]
    assert rows_of[1] - rows_of[0] >= 2
    assert "(log scale)" in compare.drawing(read(a, b), 80).plain


@pytest.mark.parametrize("rows", [[{"step": 1, "loss": 0.0}], [{"step": 3, "eval_loss": -2.0}]])
def test_a_single_point_is_drawn(make: Make, rows: list[dict[str, Any]]) -> None:
    """One step, one evaluation, a loss of nothing or less: no scale fails."""
    text = "".join(drawn_lines(make("a", rows=rows, result=None), make("b", rows=[], result=None)))
    assert text.replace("│", "").split() == ["a" if "loss" in rows[0] else "A"]


def test_more_runs_than_letters(make: Make) -> None:
    """Those without a letter are named."""
    text = compare.drawing(read(*(make(f"run-{number:02d}") for number in range(28))), 80).plain
    assert text.splitlines()[-3:] == ["  z run-25", "  not drawn: run-26", "  not drawn: run-27"]


def test_no_losses_yet(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The table all the same."""
    assert cli.main(["compare", str(make("a", rows=[])), str(make("b", rows=None))]) == 0
    text = capsys.readouterr().out
    assert "no losses to draw yet" in text
    assert "no setting differs" in text


def test_means_of_many_points() -> None:
    """Thinned to as many as wanted, smoothed over what came before."""
    points = [(float(x), float(x)) for x in range(100)]
    assert compare._thinned(points, 10)[:2] == [(4.5, 4.5), (14.5, 14.5)]
    assert len(compare._thinned(points, 30)) <= 30
    assert compare._thinned(points, 100) == points
    smoothed = compare._smoothed(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert [y for _, y in smoothed][:3] == [0.0, 0.5, 1.0]
    assert smoothed[-1] == (99.0, 97.0)


def test_tokens_and_seconds_up_to_a_step(make: Make) -> None:
    """The held-out loss of a step stands where its training loss stands."""
    run, _ = read(make("a", rows=[*ROWS[:3], {"step": 2, "checkpoint_wait_s": 1.5}, *ROWS[3:]]), make("b"))
    assert run.counted("tokens") == {0: 0, 1: 1000, 2: 2000, 3: 3000, 4: 4000}
    assert run.counted("step_time_s", "checkpoint_wait_s")[4] == 9.5


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_file(make: Make, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture, with the runs' names in it, one of them without held-out losses."""
    file = tmp_path / f"curves.{ending}"
    runs = [make("lora"), make("full", rows=ROWS[1:3]), make("begun", rows=None, result=None)]
    assert cli.main(["compare", *map(str, runs), "--plot", str(file)]) == 0
    assert f"curves drawn into {file}" in capsys.readouterr().out
    content = file.read_bytes()
    if ending == "png":
        assert content.startswith(b"\x89PNG")
        return
    for text in (
        b"lora",
        b"lora, held-out",
        b"full",
        b"tokens",
        b"seconds in steps and waiting for checkpoints",
    ):
        assert b"<!-- " + text + b" -->" in content
    for text in (b"full, held-out", b"begun"):
        assert b"<!-- " + text + b" -->" not in content


def test_plotted_curves(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses over tokens, and over the seconds of steps and waits."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))
    rows = [*ROWS[:3], {"step": 2, "checkpoint_wait_s": 1.5}, *ROWS[3:]]
    compare.compare([str(make("a", rows=rows)), str(make("b", rows=None))], str(tmp_path / "x.svg"))
    curves = [line.get_xydata().T.tolist() for axes in figures[0].axes for line in axes.lines]
    training, held_out = [8.0, 4.0, 8 / 3, 2.0], [8.0, 2.5, 2.75]
    expected = [
        ([1000, 2000, 3000, 4000], training),
        ([0, 3000, 4000], held_out),
        ([2.0, 5.5, 7.5, 9.5], training),
        ([0, 7.5, 9.5], held_out),
    ]
    for (x, y), (expected_x, expected_y) in zip(curves, expected, strict=True):
        assert x == expected_x
        assert y == pytest.approx(expected_y)


# ------------------------------------------------------------------------------------------------- errors


def test_all_bad_directories_are_named_at_once(make: Make, tmp_path: Path) -> None:
    """Missing, no run, a model, damaged, a file, a scheme that nobody knows."""
    good = make("good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    (make("torn") / "config.json").write_text("{")
    (make("listed") / "result.json").write_text("[]")
    names = ("missing", "empty", "model", "torn", "listed", "good/config.json")
    with pytest.raises(UserError) as raised:
        read_runs([str(good), *(str(tmp_path / name) for name in names), "nothing://a/b"])
    assert [
        line.removeprefix(f"{tmp_path}/").split("(")[0] for line in str(raised.value).splitlines()[:6]
    ] == [
        "missing: there is no such directory; check the path.",
        "empty: is no run directory; name the one that holds a run's config.json.",
        "model: is no run directory; name the one that holds a run's config.json.",
        "torn/config.json: is damaged ",
        "listed/result.json: is damaged ",
        "good/config.json: is no run directory; name the one that holds a run's config.json.",
    ]
    assert "nothing://a/b: can't be read" in str(raised.value)


@pytest.mark.parametrize("names", [[], ["a"], ["a", "./a/"]])
def test_fewer_than_two_runs(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
) -> None:
    """Also where one is named twice."""
    make("a")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *names]) == 2
    assert "at least two run directories" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", ['{"step": 2, "lo\n', "7\n", '{"loss": 1.0}\n', "\0\0\0\n", '{"step": null}\n']
)
def test_a_damaged_line_is_named(make: Make, bad: str) -> None:
    """With its file and number."""
    run = make("a")
    first, *others = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join((first, bad, *others)))
    with pytest.raises(UserError, match=r"/a/metrics\.jsonl, line 2: is damaged"):
        read(run, make("b"))


def test_a_last_line_half_written_is_passed_over(make: Make) -> None:
    """The run may just be writing it."""
    run = make("a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert facts_of(run, make("b"))["steps"] == ["4", "4"]


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        ("curves.jpg", "must end with .png or .svg"),
        ("curves", "must end with .png or .svg"),
        ("nowhere/curves.png", "no such folder"),
        ("there.png", "is there already"),
    ],
)
def test_a_plot_that_can_not_be_is_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plot: str,
    words: str,
) -> None:
    """Before the runs are read."""
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_text("mine")
    assert cli.main(["compare", "no", "runs", "--plot", plot]) == 2
    assert words in capsys.readouterr().err
    assert Path("there.png").read_text() == "mine"


def test_a_folder_that_can_not_be_written_to(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of the system, without a traceback."""
    from matplotlib.figure import Figure

    def refuse(*_: object) -> None:
        raise PermissionError("permission denied")

    monkeypatch.setattr(Figure, "savefig", refuse)
    with pytest.raises(UserError, match=r"x\.svg: can't be written: permission denied"):
        compare.compare([str(make("a")), str(make("b"))], str(tmp_path / "x.svg"))


def test_it_loads_no_heavy_library() -> None:
    """Run directories are files: no torch, no Ray, and matplotlib only for a plot."""
    code = (
        "import sys\nimport raytune_ds.compare\n"
        "print(*[m for m in ('torch', 'ray', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
