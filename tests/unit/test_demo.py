"""What the demo says of itself: figures that were measured, and no more than their intervals hold."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.config import Config
from raytune_ds.demo import run as module
from raytune_ds.demo.run import HELD_OUT, demo, learned, lesson
from raytune_ds.evaluate import Report
from raytune_ds.evaluation import results
from raytune_ds.evaluation.comparison import Metric
from raytune_ds.evaluation.intervals import rate
from raytune_ds.evaluation.results import Measured
from raytune_ds.launch import Result
from raytune_ds.rundir import RunDir
from tests.runs import finished_run

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 180


def report(before: int, after: int) -> Report:
    """Of so many right answers to ROWS questions."""
    exact = Metric("exact_match", rate(after, ROWS), rate(before, ROWS))
    return Report(RunDir("run"), (Measured(HELD_OUT, "data", "", "", (exact,), {}),), ())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0, 170, True), (0, 4, False), (80, 95, False), (80, 110, True), (170, 10, False), (0, 0, False)],
)
def test_learned_is_what_lies_beyond_the_base_s_interval(before: int, after: int, expected: bool) -> None:
    found = report(before, after)
    assert learned(found) is expected
    said = lesson({"lora": report(0, ROWS), "full": found})
    assert said.startswith("The model learned" if expected else "Nothing is proved of full:")


def test_figures_are_measured_on_the_runs_and_prove_nothing_of_untrained_ones(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Random adapters in place of trained ones."""
    for name in ("held_out_rows", "recall_rows"):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda whole=whole: islice(whole(), 4))

    def launched(config: Config, debug: bool) -> Result:
        run = finished_run(tmp_path / str(config.run.name), tiny_models["qwen2"])
        progress: dict[str, Any] = {"first_eval_loss": 2.0, "last_eval_loss": 1.0, "seconds": 1.0}
        return Result("finished", str(run), progress, 1.0, 1, "ddp", 1000, (1.0,), 1000, ())

    monkeypatch.setattr(module, "launch", launched)
    reports = demo(str(tmp_path))
    for name in ("lora", "full"):
        written = {one.name: one for one in results.read(RunDir(str(tmp_path / name / "run")))}
        assert written[HELD_OUT].metrics == reports[name].of(HELD_OUT).metrics
        assert written[HELD_OUT].metric("exact_match").tuned.n == 4
    said = capsys.readouterr().out
    assert "Nothing is proved of lora and full" in " ".join(said.split())
    assert "learned what" not in said
