"""A whole worker whose storage fails: it goes on, or stops and can be resumed, and nothing that was whole is lost."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from raytune_ds import catalog, checkpoint, storage
from raytune_ds.assignment import Assignment
from raytune_ds.catalog import CheckpointError
from raytune_ds.data.store import Store
from raytune_ds.world import World
from tests import alone
from tests.alone import STEPS, Events

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return alone.prepared(tmp_path_factory.mktemp("root"))


def whole_checkpoints(given: Assignment) -> list[int]:
    """Those that verify."""
    found = []
    for step in catalog.steps(given.run.checkpoints):
        try:
            checkpoint.verify(catalog.directory(given.run.checkpoints, step), World.alone())
            found.append(step)
        except CheckpointError:
            continue
    return found


def work_on(given: Assignment, most: int = 1) -> tuple[int, Events]:
    """The same run, launched until it is finished: how often that was, and what was reported.

    No launch may leave the run without a checkpoint that it found.
    """
    events: Events = []
    for launch in range(1, most + 1):
        before = whole_checkpoints(given)
        try:
            outcome = alone.work(given, lambda *event: events.append(event))
        except OSError as error:  # Ray Train would start it again
            events.append(("warning", {"text": str(error)}))
            outcome = None
        after = whole_checkpoints(given)
        assert not before or (after and after[-1] >= before[-1]), (before, after)
        if outcome is not None and outcome.error is None:
            return launch, events
    raise AssertionError(f"not finished after {most} launches: {events[-3:]}")


def weights(given: Assignment) -> dict[str, torch.Tensor]:
    path = catalog.directory(given.run.checkpoints, STEPS)
    reader = checkpoint.Reader(path, checkpoint.verify(path, World.alone()))
    return {name: reader.whole(name) for name in reader.shapes}


def assert_same_end(given: Assignment, calm: Assignment) -> None:
    ours, theirs = weights(given), weights(calm)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [row["step"] for row in given.run.read_metrics() if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert storage.list_names(given.run.final)


class OneInThree:
    """Each third call fails, or, with a seed, any call as often."""

    def __init__(self, seed: int | None) -> None:
        self._calls = self.failed = 0
        self._random = None if seed is None else random.Random(seed)

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % 3 == 0 if self._random is None else self._random.random() < 1 / 3:
            self.failed += 1
            raise OSError(errno.EIO, "Input/output error")


class UnreliableStore(pafs.FSSpecHandler):  # type: ignore[misc]  # pyarrow's, untyped
    """Somebody else's disk."""

    def __init__(self, fails: OneInThree) -> None:
        super().__init__(LocalFileSystem())
        self._fails = fails

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._fails()
        return super().open_output_stream(path, metadata)


def fail_in_a_bucket(patch: pytest.MonkeyPatch, fails: OneInThree, folder: Path) -> None:
    store = pafs.SubTreeFileSystem(str(folder), pafs.PyFileSystem(UnreliableStore(fails)))
    reliable = storage.open_filesystem

    def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
        inside = path.removeprefix("mem://")
        return (store, inside.rstrip("/")) if inside != path else reliable(path)

    patch.setattr(storage, "open_filesystem", open_filesystem)


def fail_on_a_disk(patch: pytest.MonkeyPatch, fails: OneInThree) -> None:
    """Once the bytes are on their way."""
    fsync = os.fsync

    def unreliable(handle: int) -> None:
        fails()
        fsync(handle)

    patch.setattr(os, "fsync", unreliable)


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize(
    ("pauses_s", "seed", "launches"),
    [((0.0, 0.0), None, 1), ((), 0, 40), ((), 1, 40)],
    ids=["every third", "any, and nothing is tried again", "any other"],
)
def test_a_third_of_all_writes_fail(
    where: str,
    pauses_s: tuple[float, ...],
    seed: int | None,
    launches: int,
    store: Store,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fails is tried again, and training goes on. Without that launches end, but the next one goes on."""
    root, model = str(tmp_path / "runs") if where == "disk" else bucket, tiny_models["llama"]
    calm = alone.assignment(store, model, root, "calm")
    work_on(calm)
    given = alone.assignment(store, model, root, "unlucky")
    fails = OneInThree(seed)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "PAUSES_S", pauses_s)
        if where == "disk":
            fail_on_a_disk(patch, fails)
        else:
            fail_in_a_bucket(patch, fails, tmp_path / "bucket")
        work_on(given, launches)
    assert fails.failed > 1
    assert_same_end(given, calm)


@pytest.mark.parametrize(("room", "ends"), [(2.5, True), (1.5, False)])
def test_a_disk_that_fills_up(
    room: float,
    ends: bool,
    store: Store,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for two checkpoints and final/ the older one goes in time. With less, somebody has to make some."""
    model, root = tiny_models["llama"], tmp_path / "runs"
    calm = alone.assignment(store, model, str(root), "calm")
    work_on(calm)
    given = alone.assignment(store, model, str(root), "full")
    size = storage.size_of(catalog.directory(calm.run.checkpoints, STEPS))
    events: Events = []
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", filling_up(Path(given.run.path), int(room * size)))
        outcome = alone.work(given, lambda *event: events.append(event))
    warnings = [content["text"] for kind, content in events if kind == "warning"]
    assert (outcome.error is None) == ends
    assert any("can't be written" in text for text in warnings) != ends
    assert whole_checkpoints(given)
    work_on(given)
    assert_same_end(given, calm)


def filling_up(folder: Path, room: int) -> Callable[[str, bytes], None]:
    write = storage.write_bytes

    def full(path: str, content: bytes) -> None:
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if used + len(content) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    return full


def test_the_harness_tells_a_run_that_lost_a_checkpoint(
    store: Store, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    given = alone.assignment(store, tiny_models["llama"], str(tmp_path), "whole")
    work_on(given)
    found = whole_checkpoints(given)
    assert found[-1] == STEPS
    pafs.LocalFileSystem().delete_file(f"{catalog.directory(given.run.checkpoints, STEPS)}/manifest.json")
    assert whole_checkpoints(given) == found[:-1]
