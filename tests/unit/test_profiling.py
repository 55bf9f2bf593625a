"""The profile of some steps: what it says, and that no run ends for it."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ds import profiling, storage, worker
from raytune_ds.assignment import Assignment
from raytune_ds.data import batchid
from raytune_ds.data.batch import Batch
from raytune_ds.data.rows import step_rows
from raytune_ds.data.store import Store
from raytune_ds.hooks import Orders
from raytune_ds.objectives import OBJECTIVES
from raytune_ds.phases import phase, tell
from raytune_ds.profilepage import Operator, Operators, Profiled, RankTimes, page
from raytune_ds.profiling import Profile, Timeline, counted, trace_name
from raytune_ds.rundir import RunDir
from raytune_ds.world import World
from tests import alone
from tests.alone import Events
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


# ---- the clock -------------------------------------------------------------------------------------


class Clock:
    """Time as the test lets it pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: self.now)


def test_a_phase_counts_without_those_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """But an evaluation with them: what it sums over ranks is no part of a step."""
    clock, timeline = Clock(monkeypatch), Timeline(CPU)
    timeline.begin()
    clock.now += 1
    with timeline.phase("optimizer"):
        clock.now += 2
        with timeline.phase("collective"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    with timeline.phase("evaluation"), timeline.phase("collective"):
        clock.now += 32
    with timeline.phase("collective"):
        clock.now += 64
    timeline.end()
    clock.now += 128
    assert timeline.seconds() == {"other": 17, "optimizer": 10, "collective": 68, "evaluation": 32}


def test_a_phase_that_ends_in_an_error_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timeline = Clock(monkeypatch), Timeline(CPU)
    timeline.begin()
    with contextlib.suppress(ValueError), timeline.phase("forward"):
        clock.now += 1
        raise ValueError
    clock.now += 2
    timeline.end()
    assert timeline.seconds() == {"forward": 1, "other": 2}


def test_labels_that_nobody_hears_are_one_and_the_same() -> None:
    """Nothing is made for them."""
    tell(None)
    assert phase("forward") is phase("backward")


def test_a_sum_over_ranks_is_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: happened.append("summed"))

    def hear(name: str) -> contextlib.AbstractContextManager[None]:
        happened.append(name)
        return contextlib.nullcontext()

    tell(hear)
    World(0, 2, CPU).sum(1.0)
    World.alone().sum(1.0)
    tell(None)
    World(0, 2, CPU).sum(1.0)
    assert happened == ["collective", "summed", "summed"]


# ---- operators --------------------------------------------------------------------------------------


def event(key: str, on: str, count: int, cpu_s: float, device_s: float, label: bool = False) -> Any:
    """As torch sums them up by name."""
    return SimpleNamespace(
        key=key,
        device_type=SimpleNamespace(name=on),
        count=count,
        self_cpu_time_total=cpu_s * 1e6,
        self_device_time_total=device_s * 1e6,
        is_user_annotation=label,
    )


def test_on_a_gpu_operators_count_by_the_kernels_they_start() -> None:
    events = [
        event("forward", "CPU", 2, 9.0, 8.0, label=True),
        event("aten::add", "CPU", 3, 5.0, 1.0),
        event("aten::mm", "CPU", 4, 1.0, 6.0),
        event("forward", "CUDA", 2, 0.0, 8.0, label=True),
        event("gemm_kernel", "CUDA", 4, 0.0, 6.0),
        event("Memcpy HtoD", "CUDA", 1, 0.0, 0.5),
    ]
    assert counted(events, on_gpu=True) == Operators(
        (Operator("aten::mm", 4, 6.0), Operator("aten::add", 3, 1.0)), kernel_s=6.5
    )
    assert counted(events[:3], on_gpu=False) == Operators(
        (Operator("forward itself", 2, 9.0), Operator("aten::add", 3, 5.0), Operator("aten::mm", 4, 1.0))
    )


# ---- a whole worker --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return alone.prepared(tmp_path_factory.mktemp("root"))


class Case:
    """A run in this process."""

    def __init__(self, store: Store, model: Path) -> None:
        self._store, self._model = store, model
        self.root = str(Path(store.path).parents[1])
        self.events: Events = []

    def assignment(self, name: str, **train: Any) -> Assignment:
        return alone.assignment(self._store, self._model, self.root, name, **train)

    def run(self, name: str, stop_asked: Callable[[], bool] = lambda: False, **train: Any) -> RunDir:
        self.events = []
        given = self.assignment(name, **train)
        outcome = alone.work(given, lambda *event: self.events.append(event), Orders(stop_asked=stop_asked))
        assert outcome.error is None
        return given.run

    def said(self, kind: str) -> list[str]:
        """Notes or warnings about profiles."""
        return [content["text"] for k, content in self.events if k == kind and "profile" in content["text"]]


@pytest.fixture
def case(store: Store, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(worker, "_save_final", lambda *_: type("Final", (), {"size": 0}))
    return Case(store, tiny_models["llama"])


def summary(run: RunDir) -> str:
    return storage.read_bytes(f"{run.profile}/summary.md").decode()


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in run.read_metrics() if "loss" in row]


def names(run: RunDir) -> list[str]:
    return storage.list_names(run.profile)


def test_a_profile_says_where_the_time_went_and_changes_nothing(case: Case) -> None:
    run = case.run("profiled", profile=[4, 5], max_steps=6)
    assert names(run) == [trace_name(4, 5, 0), "summary.md"]
    (note,) = case.said("note")
    assert note.startswith("profile of steps 4 to 5: ")
    assert f"{run.profile}/summary.md" in note
    text = summary(run)
    assert "profiled, steps 4 to 5" in text
    assert "1 worker; 2 steps." in text
    assert "in the 2 steps before" in text
    assert "Between these steps, and in the operators below: checkpoint" in text
    parts = ("data wait", "forward", "backward", "collective", "optimizer", "metrics and logging", "other")
    shares = {part: float(cells(text, part)[2].removesuffix(" %")) for part in parts}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares["forward"], shares["backward"], shares["optimizer"], shares["data wait"]) > 0
    assert cells(text, "`aten::mm`")[1] != "0.0"
    assert losses(run) == losses(case.run("calm", max_steps=6)), "the same steps without a profile"
    assert case.said("note") == []


def test_each_step_says_what_it_made_of_the_hardware(case: Case) -> None:
    run = case.run("rates", max_steps=2)
    rows = [row for row in run.read_metrics() if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["targets"] == row["weight"], "each weighs 1 here"
        assert row["tokens"] < row["pairs"] < row["tokens"] ** 2
        assert row["model_tflops"] > 0
        assert "mfu" not in row, "nobody knows what a CPU could do"


def test_the_trace_has_each_phase_of_each_step(case: Case) -> None:
    run = case.run("traced", profile=[2, 3], max_steps=4)
    events = json.loads(gzip.decompress(storage.read_bytes(f"{run.profile}/{names(run)[0]}")))["traceEvents"]
    for name in ("fetch", "forward", "backward", "optimizer", "logging"):
        assert sum(event.get("name") == name and event["ph"] == "X" for event in events) == 2, name


@pytest.mark.parametrize(("window", "steps"), [([3, 99], (3, 4)), ([4, 4], (4, 4))])
def test_a_run_that_ends_in_the_middle_has_the_profile_of_what_there_was(
    case: Case, window: list[int], steps: tuple[int, int]
) -> None:
    run = case.run(f"short-{window[1]}", profile=window, max_steps=4)
    assert names(run) == [trace_name(*steps, 0), "summary.md"]


def test_a_run_that_is_too_short_says_so_before_it_begins(case: Case) -> None:
    run = case.run("too-short", profile=[3, 20], max_steps=2)
    assert case.said("warning") == [
        "train.profile = [3, 20]: the run has 2 steps, so none of them is profiled"
    ]
    assert case.events.index(("warning", {"text": case.said("warning")[0]})) < [
        kind for kind, _ in case.events
    ].index("step")
    assert names(run) == []


def test_a_long_profile_is_of_its_first_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROFILED_STEPS", 2)
    run = case.run("long", profile=[2, 5], max_steps=5)
    assert names(run) == [trace_name(2, 3, 0), "summary.md"]
    assert "train.profile: the first 2 steps, [2, 3], are profiled" in case.said("note")


def test_a_run_that_goes_on_in_the_middle_profiles_the_rest(case: Case) -> None:
    asked = iter([False] * 2 + [True])
    run = case.run("in-two", lambda: next(asked), profile=[3, 4], max_steps=6)
    assert names(run) == [trace_name(3, 3, 0), "summary.md"]
    case.run("in-two", profile=[2, 4], max_steps=6)
    assert names(run) == [trace_name(3, 3, 0), trace_name(4, 4, 0), "summary.md"]
    assert "in-two, step 4\n" in summary(run)
    case.run("in-two", profile=[2, 4], max_steps=6)
    assert case.said("note") == [], "all of them are done"


@pytest.mark.parametrize(
    ("window", "steps", "counted"),
    [
        ([6, 8], (5, 8), "4 steps, 2 of them skipped"),  # 6 and 7, and then 5 and 8
        ([5, 5], (5, 5), "1 step. "),  # once, although it is trained on twice
    ],
)
def test_steps_that_are_skipped_and_done_again_do_not_disturb_it(
    case: Case,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    window: list[int],
    steps: tuple[int, int],
    counted: str,
) -> None:
    """Steps 6 and 7 go wrong, so the run goes back to step 4, and goes on without them."""
    objective = OBJECTIVES["sft"]
    order = store.order("train", 4, 0)
    bad = {step_rows(store, order, step).batch for step in (6, 7)}

    def spoiled(module: nn.Module, batch: Batch) -> torch.Tensor:
        spoils = batchid.text(batch.rows) in bad
        return objective(module, batch) * (float("nan") if spoils else 1.0)

    monkeypatch.setitem(OBJECTIVES, "sft", spoiled)
    monkeypatch.setattr(profiling, "counted", lambda *_: Operators())  # which takes a while
    settings: dict[str, Any] = {"max_skipped_steps": 2, "on_skipped_steps": "rewind", "max_steps": 9}
    run = case.run(f"rewound-{window[0]}", profile=window, **settings)
    assert names(run) == [trace_name(*steps, 0), "summary.md"]
    assert counted in summary(run)
    assert len(case.said("note")) == 1


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("no profile today\nbecause of something")


@pytest.mark.parametrize(
    ("place", "name", "left"),
    [
        (profiling.profile, "start", "summary.md"),
        (profiling.profile, "export_chrome_trace", "summary.md"),
        (profiling.storage, "copy", "summary.md"),
        (profiling.Timeline, "seconds", trace_name(3, 3, 0)),
    ],
)
def test_what_goes_wrong_with_a_profile_does_not_stop_the_run(
    case: Case, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, left: str
) -> None:
    monkeypatch.setattr(place, name, fails)
    run = case.run(f"failing-{name}", profile=[3, 3], max_steps=4)
    assert len(losses(run)) == 4
    assert case.said("warning")[0] == "train.profile: rank 0: RuntimeError: no profile today"
    assert names(run) == [left]
    if left == "summary.md":
        assert cells(summary(run), "forward")
        assert ("aten::" in summary(run)) == (name != "start")


def test_a_page_that_can_not_be_written_is_a_warning(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "page", fails)
    run = case.run("no-page", profile=[3, 3], max_steps=4)
    assert case.said("warning") == ["train.profile: no summary: RuntimeError: no profile today"]
    assert names(run) == [trace_name(3, 3, 0)]


# ---- several ranks ---------------------------------------------------------------------------------


ROW = {"step_time_s": 2.0, "tokens": 100, "model_tflops": 3.0, "mfu": 0.25, "skipped": False}


def test_ranks_meet_although_one_of_them_has_no_profile(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In storage that is no file tree."""

    class Profiler:
        """As torch's, of which a process can have but one at a time."""

        def __init__(self, activities: Any) -> None:
            self._out: list[str] = []

        def start(self) -> None:
            if of_thread.rank == 1:
                fails()

        def stop(self) -> None:
            pass

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_bytes(b"trace")

        def key_averages(self) -> list[Any]:
            return []

    of_thread = threading.local()
    monkeypatch.setattr(profiling, "profile", Profiler)
    run, said = RunDir(f"{bucket}/one"), []

    def work(world: World) -> None:
        of_thread.rank = world.rank
        profile = Profile(
            (2, 3),
            run,
            world,
            lambda: 100.0 * (world.rank + 1),
            note=lambda text: said.append((world.rank, text)),
            warn=lambda text: said.append((world.rank, text)),
        )
        for step in range(1, 5):
            profile.begins(step)
            with phase("forward"):
                pass
            with phase("collective"):
                pass
            profile.log(ROW | {"step": step})
        profile.end()

    assert on_ranks(2, work) == [None, None]
    assert names(run) == [trace_name(2, 3, 0), "summary.md"]
    assert storage.read_bytes(f"{run.profile}/{trace_name(2, 3, 0)}") == b"trace"
    text = summary(run)
    assert "2 workers; 2 steps" in text
    assert "peak memory 200 MiB" in text
    assert [cells(text, str(rank))[-1] for rank in (0, 1)] == ["100", "200"]
    assert [text.split(":")[0] for rank, text in said if rank == 0] == [
        "profile of steps 2 to 3",
        "train.profile",
    ]
    assert said[-1][1] == "train.profile: rank 1: RuntimeError: no profile today"
    assert {rank for rank, _ in said} == {0}, "nobody sees what others say"


def test_the_page_of_a_gpu() -> None:
    """Figures by hand: two steps of 4 s each by its clock."""
    rank = RankTimes({"forward": 3.0, "backward": 4.0, "other": 1.0, "evaluation": 2.0}, 1000.0)
    waits = RankTimes({"forward": 1.0, "backward": 2.0, "collective": 5.0}, 2000.0)
    rows = [ROW | {"step": 7}, ROW | {"step": 8, "step_time_s": 6.0, "model_tflops": 1.0, "mfu": 0.05}]
    operators = Operators([Operator("aten::mm", 20, 6.0), Operator("aten::add", 3, 1.0)], kernel_s=7.5)
    text = page(Profiled("run", "NVIDIA H200", rows, [ROW], [rank, waits], operators))
    assert (
        "NVIDIA H200, 2 workers; 2 steps. 4,000 ms a step, 25 tokens/s, 1.5 model TFLOP/s, MFU 10.0 %" in text
    )
    assert "peak memory 2,000 MiB a worker" in text
    assert "the median step took 4,000 ms with it, and 2,000 ms in the 1 step before" in text
    assert cells(text, "forward")[1:3] == ["1,500", "37.5 %"]
    assert cells(text, "backward")[1:3] == ["2,000", "50.0 %"]
    assert cells(text, "1")[4] == "2,500"
    assert "By the GPU's clock" in text
    assert "The GPU was busy for 75.0 % of the time" in text
    assert cells(text, "`aten::mm`")[1:] == ["10.0", "3,000", "60.0 %"]
    assert text.index("aten::mm") < text.index("aten::add")
