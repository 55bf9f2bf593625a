"""The way between the workers and the driver: nothing that was told is lost, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from raytune_ds import early, fitting, reporter
from raytune_ds.cluster import Scale
from raytune_ds.config import ScalingConfig
from raytune_ds.downtime import Downtime
from raytune_ds.fitting import _Following
from raytune_ds.mailbox import Mailbox
from raytune_ds.rundir import RunDir
from raytune_ds.stacks import Place
from raytune_ds.startup import Startup
from raytune_ds.watch import Pulse

Post = Mailbox.__ray_metadata__.modified_class


class Remote:
    """A mailbox whose answers come when they are asked for; some of them late."""

    def __init__(self, late: int) -> None:
        self.late, self.posts, self.judged, self.stopped = (
            late,
            [("eval", {"step": 3}, 0.0)],
            list[Any](),
            False,
        )
        self.take = SimpleNamespace(remote=self._take)
        self.judge = SimpleNamespace(remote=lambda step, goes_on: self.judged.append((step, goes_on)))
        self.stop = SimpleNamespace(remote=lambda: setattr(self, "stopped", True))

    def _take(self) -> list[Any]:
        taken, self.posts = self.posts, []
        return taken

    def get(self, answer: list[Any], timeout: float) -> list[Any]:
        if self.late:
            self.late -= 1
            raise ray.exceptions.GetTimeoutError
        return answer


class Watcher:
    """Says no to the third step, or fails."""

    judges = True

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails

    def show(self, kind: str, content: dict[str, Any]) -> None:
        if self._fails:
            raise ValueError(kind)

    def goes_on(self, step: int) -> bool:
        return step != 3


def followed(monkeypatch: pytest.MonkeyPatch, mailbox: Remote, watcher: Watcher) -> None:
    """Follows the mailbox until somebody was judged."""
    monkeypatch.setattr(fitting, "POLL_S", 0.001)
    monkeypatch.setattr(fitting.ray, "get", mailbox.get)
    with _Following(mailbox, watcher, RunDir("/nowhere"), Downtime(), Startup(0.0)):  # type: ignore[arg-type]
        for _ in range(2000):
            if mailbox.judged:
                break
            threading.Event().wait(0.005)


def test_an_answer_that_comes_late_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers wait for the verdict that it asks for."""
    mailbox = Remote(late=3)
    followed(monkeypatch, mailbox, Watcher())
    assert (mailbox.judged, mailbox.stopped) == ([(3, False)], False)


def test_a_watcher_that_fails_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mailbox = Remote(late=0)
    followed(monkeypatch, mailbox, Watcher(fails=True))
    assert (mailbox.judged, mailbox.stopped) == ([(0, False)], True)
    assert "could not be dealt with: ValueError('eval')" in capsys.readouterr().err


def test_a_verdict_is_for_its_step_and_an_end_for_all() -> None:
    """Whoever was restarted asks about a later step than the one that was judged."""

    async def verdicts() -> list[Any]:
        post = Post("run", ScalingConfig())
        asked = [asyncio.create_task(post.verdict(step)) for step in (1, 2, 3)]
        await asyncio.sleep(0)
        await post.judge(1, True)
        done = [task.done() for task in [asked[0], *asked[1:]] if not await asyncio.sleep(0)]
        await post.judge(2, False)
        return [done, *await asyncio.gather(*asked), await post.verdict(4)]

    assert asyncio.run(asyncio.wait_for(verdicts(), 10)) == [[True, False, False], True, False, False, False]


def test_a_verdict_may_come_before_it_is_asked_for() -> None:
    async def verdict() -> bool:
        post = Post("run", ScalingConfig())
        await post.judge(1, True)
        return bool(await post.verdict(1))

    assert asyncio.run(asyncio.wait_for(verdict(), 10))


class Lost(WorkerHealthCheckFailedError):
    """A worker whose process is gone."""

    def __init__(self, text: str) -> None:
        super().__init__("A worker health check failed.", RuntimeError(text))


PEER = RuntimeError("gloo: Connection reset by peer")
EXIT = "Worker exit type: SYSTEM_ERROR."


@pytest.mark.parametrize(
    ("failures", "ranks", "reason"),
    [
        (
            {0: PEER, 1: Lost("Worker exit type: SYSTEM_ERROR. Some common causes include: (1)")},
            [1],
            "Worker exit type: SYSTEM_ERROR.",
        ),
        (
            {0: PEER, 2: RuntimeError("CUDA out of memory")},
            [0, 2],
            "gloo: Connection reset by peer",
        ),
        ({1: WorkerHealthCheckTimeoutError("slow")}, [1], "Ray could not reach it"),
        ({3: ValueError()}, [3], "ValueError"),
    ],
)
def test_who_died_is_told_and_not_what_it_did_to_the_others(
    failures: dict[int, Exception], ranks: list[int], reason: str
) -> None:
    assert reporter._why(WorkerGroupError("...", failures)) == (ranks, reason)


def test_a_restart_without_a_death_has_its_reason_too() -> None:
    """A node that gave notice, whose time is up."""
    assert reporter._why(RuntimeError("interrupted by node preemption")) == (
        [],
        "interrupted by node preemption",
    )


def test_signs_of_life_count_from_the_group_that_is_there_only() -> None:
    post = Post("run", ScalingConfig(hang_timeout_s=0.001))
    pulse = Pulse(0)
    pulse.moves("computing step 1")
    post.group({0: ("node", 7)})
    post.beat(pulse.beat(), Place("node", 6, 0.0, "old"))
    assert not post._places
    post.beat(pulse.beat(), Place("node", 7, 0.0, "new"))
    while not post.condemned():
        continue
    told = [(kind, content["places"][0].file) for kind, content, _ in post.take() if kind == "hang"]
    assert told == [("hang", "new")]
    post.leaves(0)
    assert post.condemned() == ()


def test_ray_has_more_patience_than_our_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    monkeypatch.delenv(name, raising=False)
    scale = Scale(2, False, 1)
    for given, least in ((600.0, 1200.0), (None, 1e8)):
        settings = early.settings(ScalingConfig(hang_timeout_s=given), scale)
        assert float(settings[name]) > least
        with early.in_environment(settings):
            assert os.environ[name] == settings[name]
        assert name not in os.environ
    monkeypatch.setenv(name, "5")
    assert name not in early.settings(ScalingConfig(), scale)


def test_a_restart_is_told_once_however_long_it_takes() -> None:
    """Ray Train says so again and again while there is no room for new workers; nobody hangs meanwhile."""
    told: list[Any] = []
    tells = reporter.Reporter(SimpleNamespace(restart=SimpleNamespace(remote=lambda *why: told.append(why))))
    running, restarting = RunningState(), RestartingState(WorkerGroupError("...", {1: ValueError("bad")}))
    tells.after_controller_state_update(running, restarting)
    for _ in range(3):
        tells.after_controller_state_update(restarting, restarting)
    assert told == [([1], "bad")]
    post = Post("run", ScalingConfig(hang_timeout_s=0.001))
    post.group({0: ("node", 7)})
    post.restart([0], "bad")
    threading.Event().wait(0.01)
    assert [kind for kind, _, _ in post.take()] == ["restart"]


def test_two_runs_of_a_process_set_the_same_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first has set was not set by the user, and stays until both have ended."""
    scale = Scale(2, False, 1)
    monkeypatch.delenv(early.OWN_WATCHER, raising=False)
    first = early.settings(ScalingConfig(), scale)
    with early.in_environment(first):
        second = early.settings(ScalingConfig(), scale)
        assert second == first
        with early.in_environment(second):
            pass
        assert os.environ[early.OWN_WATCHER] == "0"
    assert early.OWN_WATCHER not in os.environ


@pytest.mark.parametrize(("actor", "cleans"), [(None, False), ("an actor", True)])
def test_places_outlive_an_actor_alone(
    monkeypatch: pytest.MonkeyPatch, actor: str | None, cleans: bool
) -> None:
    callbacks = [object.__new__(PlacementGroupCleanerCallback), object.__new__(DatasetsCallback), "another"]
    monkeypatch.setattr(DataParallelTrainer, "_create_default_callbacks", lambda self: callbacks)
    monkeypatch.setattr(
        fitting.ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: actor)
    )
    left = object.__new__(fitting._Trainer)._create_default_callbacks()
    assert left == ([callbacks[0], "another"] if cleans else ["another"])


def test_a_controller_that_dies_alone_leaves_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lives on, as one with another run to do, gives them back."""
    removed: list[Any] = []
    monkeypatch.setattr(fitting, "remove_placement_group", removed.append)
    monkeypatch.setattr(fitting.ray, "get", lambda answer, timeout=None: answer)

    def fit() -> None:
        raise RuntimeError("the controller is gone")

    run = object.__new__(fitting.Fitting)
    run._ended, run._settings, run._run = Future(), {}, RunDir("/nowhere")
    run.downtime, run._startup, run._watcher = Downtime(), Startup(0.0), contextlib.nullcontext()  # type: ignore[assignment]
    run._trainer = SimpleNamespace(fit=fit)  # type: ignore[assignment]
    run._mailbox = SimpleNamespace(
        controller=SimpleNamespace(remote=lambda: (None, "places")),
        take=SimpleNamespace(remote=list),
        __ray_terminate__=SimpleNamespace(remote=lambda: None),
    )
    run._fit()
    with pytest.raises(RuntimeError, match="the controller is gone"):
        run.wait()
    assert removed == ["places"]
