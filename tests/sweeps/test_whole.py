"""Whole sweeps, as a user runs them: a command line beside a Ray that stays, and is looked at afterwards."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.util.state import list_actors, list_placement_groups

from raytune_ds.compose import compose
from raytune_ds.sweep.journal import Journal
from tests.head import TOKENS_OFF, Head, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CLEAN_S = 30
OF_RAY_DATA = ("_StatsActor", "_AutoscalingCoordinatorActor", "_UsageCollectionActor")
"""One of each a cluster, made by whoever reads data first; they hold no resources and stay."""
SMALL = (
    "data.seq_len=128",
    "train.max_steps=18",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.warmup_ratio=0.1",
    "tracking.to=[]",
)
TWO_WORKERS = ("scaling.num_workers=2",)
QUICK = ("model.name=tiny:qwen2", "scaling.num_workers=1", "train.max_steps=12", "sweep.reports=3")
FOUR_KEYS = (
    "sweep.space={adapter.r: {choice: [4, 8, 16, 64]}, train.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}, "
    "adapter.alpha: {choice: [8, 16, 32]}, adapter.targets: {choice: [auto, [q_a_proj, o_proj]]}}"
)
RANGES = "sweep.space={adapter.r: {randint: [2, 32]}, adapter.dropout: {uniform: [0.0, 0.2]}}"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray that stays when a driver has gone."""
    with ray_head(TOKENS_OFF) as started:
        yield started


def command(storage: Path, name: str, *arguments: str) -> list[str]:
    """The command line of a sweep."""
    start = [sys.executable, "-m", "raytune_ds.sweep", f"run.storage={storage}", f"run.name={name}"]
    return [*start, *SMALL, *arguments]


def swept(head: Head, storage: Path, name: str, *arguments: str) -> Journal:
    """Runs a sweep to its end, on that Ray."""
    environment = head.environment | {"RAY_ADDRESS": head.address}
    done = subprocess.run(
        command(storage, name, *arguments), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Journal(f"{storage}/{name}/journal.jsonl")


def leaderboard(storage: Path, name: str) -> list[dict[str, str]]:
    """Of a sweep, without what the clock and the folder decide."""
    text = (storage / name / "leaderboard.csv").read_text(encoding="utf-8")
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "run")}
        for row in csv.DictReader(text.splitlines())
    ]


def left_over(head: Head) -> list[Any]:
    """What a sweep that has ended still holds, once Ray's own cleaners have had their time."""
    end = time.monotonic() + CLEAN_S
    while True:
        groups = [g for g in list_placement_groups(address=head.dashboard) if g.state != "REMOVED"]
        actors = list_actors(address=head.dashboard, limit=1000)
        found = groups + [a for a in actors if a.state != "DEAD" and a.class_name not in OF_RAY_DATA]
        if not found or time.monotonic() > end:
            return found
        threading.Event().wait(1.0)


@pytest.mark.parametrize("engine", [(), ("engine.kind=zero", "engine.stage=2")], ids=["ddp", "zero2"])
def test_twelve_trials_by_asha_and_the_best_promoted(
    head: Head, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    arguments = (*TWO_WORKERS, FOUR_KEYS, "sweep.trials=12", *engine, "--promote")
    journal = swept(head, tmp_path, "asha", *arguments)
    status = [trial.status for trial in journal.trials]
    assert len(status) == 12
    assert set(status) == {"finished", "stopped"}
    assert len(leaderboard(tmp_path, "asha")) == 12
    assert next((tmp_path / "asha" / "promoted").glob("*/final/adapter_model.safetensors"))
    assert compose([tmp_path / "asha" / "best.yaml"], []).train.max_steps == 18
    assert left_over(head) == []


def test_a_driver_killed_five_times_makes_the_leaderboard_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    arguments = (*TWO_WORKERS, FOUR_KEYS, "sweep.trials=6")
    subprocess.run(command(tmp_path, "calm", *arguments), check=True, capture_output=True)
    dice = random.Random(0)
    killed = 0
    while killed < 5:
        process = subprocess.Popen(command(tmp_path, "killed", *arguments), stdout=subprocess.DEVNULL)
        try:
            process.wait(dice.uniform(15, 60))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed == 5, "the sweep ended before it was killed often enough"
    subprocess.run(command(tmp_path, "killed", *arguments), check=True, capture_output=True)
    assert leaderboard(tmp_path, "killed") == leaderboard(tmp_path, "calm")


def _kill(head: Head, what: str) -> None:
    """Kill -9 of the youngest process of that name of a Ray."""
    found = [
        p
        for p in psutil.process_iter(["cmdline", "create_time"])
        if what in " ".join(p.info["cmdline"] or [])
    ]
    found = [p for p in found if any(head.pid == parent.pid for parent in p.parents())]
    max(found, key=lambda p: p.info["create_time"]).kill()


def test_a_killed_trial_and_a_killed_worker_cost_only_time(head: Head, tmp_path: Path) -> None:
    arguments = (*QUICK, RANGES, "sweep.trials=2", "sweep.max_concurrent=1", "train.max_steps=60")
    swept(head, tmp_path, "calm", *arguments)
    journal = tmp_path / "killed" / "journal.jsonl"
    victims = iter(("TrialActor", "RayTrainWorker"))

    def weather() -> None:
        for number, victim in enumerate(victims, 1):
            while not journal.exists() or journal.read_bytes().count(b'"event": "report"') < number:
                threading.Event().wait(0.05)
            _kill(head, victim)

    thread = threading.Thread(target=weather, daemon=True)
    thread.start()
    swept(head, tmp_path, "killed", *arguments)
    thread.join(1)
    assert not thread.is_alive()
    assert leaderboard(tmp_path, "killed") == leaderboard(tmp_path, "calm")
    assert left_over(head) == []


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_the_worst_of_a_population_go_on_from_the_best(head: Head, tmp_path: Path, kind: str) -> None:
    space = (
        "sweep.space={adapter.r: {choice: [4, 8]}, train.learning_rate: {loguniform: [1.0e-5, 1.0e-2]}, "
        "adapter.dropout: {uniform: [0.0, 0.1]}}"
    )
    arguments = (*QUICK, space, f"sweep.scheduler.kind={kind}", "sweep.trials=3")
    journal = swept(head, tmp_path, kind, *arguments, "sweep.scheduler.quantile_fraction=0.34")
    assert [trial.status for trial in journal.trials] == ["finished"] * 3
    copied = [trial for trial in journal.trials if trial.origin]
    assert copied, "nobody was copied, or it was forgotten"
    for trial in copied:
        assert (
            trial.values["train.learning_rate"] != journal.first_values(trial.number)["train.learning_rate"]
        )
        assert [report.number for report in trial.reports] == [1, 2, 3]
    assert left_over(head) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep.scheduler.kind=hyperband", "sweep.trials=5"),
        ("sweep.scheduler.kind=median", "sweep.trials=4", "sweep.searcher.kind=random"),
        ("sweep.searcher.kind=bayesopt", "sweep.searcher.startup_trials=2", "sweep.trials=4"),
        ("sweep.metric=[eval_loss,trainable_parameters]", "sweep.scheduler.kind=none", "sweep.trials=4"),
    ],
    ids=["hyperband", "median", "bayesopt", "two-objectives"],
)
def test_every_searcher_and_scheduler_comes_to_an_end(
    head: Head, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    journal = swept(head, tmp_path, "one", *QUICK, RANGES, *arguments)
    assert len(journal.trials) in (4, 5)
    assert {trial.status for trial in journal.trials} <= {"finished", "stopped"}
    assert left_over(head) == []
