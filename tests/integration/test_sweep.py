"""A sweep on a real Ray: trials that are stopped, that fail, and one that is promoted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import ray

from raytune_ds.compose import compose
from raytune_ds.errors import UserError
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.promote import promote
from raytune_ds.sweep.run import Swept, sweep
from tests.helpers import write_jsonl

ROWS = [
    {"instruction": f"say {i} " + "please " * (i % 9), "output": f"{i} is what I say " + "now " * (i % 5)}
    for i in range(60)
]
BAD = [*ROWS, {"instruction": "say nothing", "output": 5}]
SETTINGS = (
    "model.name=tiny:qwen2",
    "data.seq_len=64",
    "data.eval.fraction=0.1",
    "scaling.num_workers=1",
    "train.global_batch=2",
    "train.micro_batch=2",
    "train.max_steps=12",
    "tracking.to=[]",
    "sweep.reports=3",
)


def swept(storage: Path, *overrides: str) -> Swept:
    """Runs a sweep."""
    return sweep(compose([], [f"run.storage={storage}", *SETTINGS, *overrides]))


def leaderboard(done: Swept) -> list[dict[str, str]]:
    """Of a sweep, without what the clock decides."""
    text = Path(done.sweep.leaderboard).read_text(encoding="utf-8")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(text.splitlines())]


def placement_groups() -> list[Any]:
    """Those that still hold resources."""
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def test_a_sweep_with_a_trial_that_fails(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_jsonl(tmp_path / "good.jsonl", ROWS), write_jsonl(tmp_path / "bad.jsonl", BAD)
    settings = (
        f"sweep.space={{data.sources: {{choice: ['{good}', '{bad}']}}, "
        "train.learning_rate: {choice: [1.0e-3, 1.0e-6]}, adapter.alpha: {expr: 4 * adapter.r}}",
        f"data.sources={good}",
        "run.name=some",
        "sweep.searcher.kind=grid",
        "sweep.scheduler.reduction_factor=2",
        # Side by side, the worse one may come to its rung first, and is not stopped then.
        "sweep.max_concurrent=1",
    )
    done = swept(tmp_path, *settings)
    status = [trial.status for trial in done.trials]
    assert status == ["finished", "stopped", "failed", "failed"]
    assert "bad.jsonl" in str(done.trials[2].reason)
    assert done.best.values["train.learning_rate"] == 1e-3
    assert placement_groups() == []
    rows = leaderboard(done)
    assert [row["status"] for row in rows].count("failed") == 2
    assert Path(done.sweep.report).stat().st_size > 1e5
    assert compose([done.sweep.best], []).adapter.alpha == 32
    stopped = json.loads((Path(done.trials[1].run) / "result.json").read_text())
    assert (stopped["status"], stopped["progress"]["step"]) == ("stopped", 4)

    capsys.readouterr()
    before = Path(done.sweep.journal).read_text()
    again = swept(tmp_path, *settings)
    assert leaderboard(again) == rows
    assert Path(done.sweep.journal).read_text().startswith(before)
    assert "going on: 4 trials have ended" in capsys.readouterr().out

    config = compose([], [f"run.storage={tmp_path}", *SETTINGS, *settings, "train.max_steps=16"])
    with pytest.raises(UserError, match=r"train.max_steps: 12 then, 16 now"):
        sweep(config)
    result = promote(config, again, anew=False)
    assert (result.status, result.progress["step"]) == ("finished", 16)
    card = (Path(result.run) / "final" / "README.md").read_text()
    assert f"the best of 4 trials of the sweep some: trial {done.best.name}" in card
    assert "from its checkpoint of step 12" in card
    assert placement_groups() == []


def test_a_sweep_whose_trials_all_fail_gives_up(ray_session: None, tmp_path: Path) -> None:
    good, bad = write_jsonl(tmp_path / "good.jsonl", ROWS), write_jsonl(tmp_path / "bad.jsonl", BAD)
    with pytest.raises(UserError) as caught:
        swept(
            tmp_path,
            f"data.sources={good}",
            f"sweep.space={{data.sources: {{choice: ['{bad}']}}, adapter.r: {{randint: [2, 64]}}}}",
            "sweep.trials=20",
            "sweep.max_concurrent=1",
            "run.name=none",
        )
    assert "all 3 trials failed:\n  0001, 0002, 0003: " in str(caught.value)
    assert len(Journal(f"{tmp_path}/none/journal.jsonl").trials) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval.fraction=0"], "sweep: there are no held-out data"),
        (
            ["scaling.num_workers=9", "train.global_batch=16"],
            "scaling.num_workers = 9: the cluster has room for 4",
        ),
        (
            ["sweep.space={scaling.num_workers: {choice: [1, 64]}}", "train.global_batch=64"],
            "scaling.num_workers = 64",
        ),
        (["sweep.space={adapter.targets: {choice: [auto, [nowhere]]}}"], "sweep.space: adapter.targets = "),
    ],
)
def test_what_can_never_be_is_told_before_anything_starts(
    ray_session: None, tmp_path: Path, overrides: list[str], message: str
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", ROWS)
    with pytest.raises(UserError) as caught:
        swept(tmp_path, f"data.sources={good}", "run.name=never", *overrides)
    assert message in str(caught.value)
    assert not (tmp_path / "never" / "journal.jsonl").exists()
