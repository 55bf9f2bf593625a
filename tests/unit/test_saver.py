"""Checkpoints while training goes on: the state of that very step, one at a time, and a full disk stops nothing."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytune_ds import catalog, checkpoint, saver, storage
from raytune_ds.catalog import Manifest
from raytune_ds.checkpoint import Reader
from raytune_ds.config import CheckpointConfig
from raytune_ds.engines import Piece, StepResult
from raytune_ds.errors import UserError
from raytune_ds.model.weights import Read
from raytune_ds.saver import Label, Saver, Written
from raytune_ds.world import World
from tests.ranks import on_ranks

ALONE = World.alone()
IDENTITY = {"model.weights": "0123"}
TIMEOUT = 30  # of what would otherwise wait for ever

State = dict[str, torch.Tensor]


class FakeEngine:
    """State that changes, and nothing else of an engine."""

    module = torch.nn.Identity()

    def __init__(self, *shape: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            "model/a": torch.randn(shape or (10, 10), generator=generator),
            "exp_avg/a": torch.randn(10, 10, generator=generator),
            "model/b": torch.randn(3, generator=generator),
        }
        self._updates = 0
        self.loads: list[int] = []
        self.asked_by: set[int] = set()  # threads

    def train(self) -> None:
        """A step, in place as an optimizer does it."""
        self._updates += 1
        for tensor in self.tensors.values():
            tensor.add_(1)

    @property
    def updates(self) -> int:
        self.asked_by.add(threading.get_ident())
        return self._updates

    def copy(self) -> State:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def pieces(self) -> Iterator[Piece]:
        self.asked_by.add(threading.get_ident())
        for name, tensor in self.tensors.items():
            yield Piece(name, 0, tensor.view(-1))

    def load(self, read: Read, updates: int) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(read(name, 0, tensor.numel()).view_as(tensor))
        self._updates = updates
        self.loads.append(updates)

    def backward(self, loss: torch.Tensor) -> None:
        raise NotImplementedError

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        raise NotImplementedError


@dataclass
class Run:
    """A saver, its engine, and what it said."""

    root: str
    background: bool = True
    keep: int = 100
    engine: FakeEngine = field(default_factory=FakeEngine)
    world: World = ALONE
    done: list[Written] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.saver = Saver(
            root=self.root,
            config=CheckpointConfig(background=self.background, keep=self.keep),
            identity=IDENTITY,
            engine=self.engine,
            shapes={name: list(tensor.shape) for name, tensor in self.engine.tensors.items()},
            world=self.world,
            done=self.done.append,
            warn=self.warnings.append,
        )

    def save(self, step: int, loss: float | None = None) -> float:
        return self.saver.save(Label(step, {"tokens": 10 * step}, loss))

    def rehearse(self) -> str:
        return self.saver.rehearse(Label(0, {}, None))

    @property
    def steps_done(self) -> list[int]:
        return [written.label.step for written in self.done]

    def newest(self) -> tuple[str, Manifest]:
        def refuse(text: str) -> None:
            raise AssertionError(text)

        found = checkpoint.newest(self.root, ALONE, refuse)
        assert found is not None
        return found

    def read(self, step: int) -> State:
        path = catalog.directory(self.root, step)
        reader = Reader(path, checkpoint.verify(path, ALONE))
        return {name: reader.whole(name) for name in reader.shapes}


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"{tmp_path}/checkpoints"


@pytest.fixture
def run(root: str) -> Iterator[Run]:
    made = Run(root)
    yield made
    if made.saver._thread is not None:
        made.saver._thread.join(TIMEOUT)
        assert not made.saver._thread.is_alive()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 400)  # 203 floats: three files


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Gate:
    """Holds each write of a file until it is opened; a clock that stands still meanwhile, and then jumps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.now, self.threads = 0.0, set[int]()
        write_bytes = storage.write_bytes

        def held(path: str, content: bytes) -> None:
            self.threads.add(threading.get_ident())
            self.reached.set()
            if not self.opened.wait(TIMEOUT):
                raise RuntimeError("the gate was never opened")
            write_bytes(path, content)

        monkeypatch.setattr(storage, "write_bytes", held)
        monkeypatch.setattr(saver, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def open(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


# ---- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_says_what_it_is(root: str, small_shards: None, background: bool) -> None:
    run = Run(root, background=background)
    run.engine.train()
    run.save(7, loss=0.5)
    run.saver.wait()
    path, manifest = run.newest()
    assert path == f"{root}/step-00000007"
    assert (manifest.step, manifest.updates, manifest.eval_loss) == (7, 1, 0.5)
    assert (manifest.identity, manifest.progress) == (IDENTITY, {"tokens": 70})
    assert manifest.shapes == {"model/a": [10, 10], "exp_avg/a": [10, 10], "model/b": [3]}
    assert len(manifest.files) == 3
    assert_equal(run.read(7), run.engine.tensors)
    (written,) = run.done
    assert (written.label, written.path) == (Label(7, {"tokens": 70}, 0.5), path)
    assert written.size == sum(file.stat().st_size for file in Path(path).glob("rank-*"))
    assert run.warnings == []


def test_the_state_is_that_of_the_call(run: Run, gate: Gate, small_shards: None) -> None:
    run.engine.train()
    expected = run.engine.copy()
    run.save(1)
    assert gate.reached.wait(TIMEOUT)
    run.engine.train()
    run.engine.tensors["model/b"] = torch.zeros(3)
    assert run.done == []
    gate.open()
    run.saver.wait()
    assert run.steps_done == [1]
    assert_equal(run.read(1), expected)
    assert run.newest()[1].updates == 1
    assert run.engine.asked_by == {threading.get_ident()}, "the thread has all it needs"


def test_each_checkpoint_has_the_state_of_its_own_call(run: Run) -> None:
    expected = {}
    for step in range(1, 5):
        run.engine.train()
        expected[step] = run.engine.copy()
        run.save(step)
        run.engine.train()
    run.saver.wait()
    assert run.steps_done == [1, 2, 3, 4]
    for step, tensors in expected.items():
        assert_equal(run.read(step), tensors)


def test_a_caller_in_the_background_is_not_kept_waiting(run: Run, gate: Gate) -> None:
    assert run.save(1) == 0.0
    assert gate.reached.wait(TIMEOUT)
    gate.open(seconds=100)
    run.saver.wait()
    assert run.done[0].seconds == 100
    assert threading.get_ident() not in gate.threads


def test_one_checkpoint_is_in_flight_at_most(
    run: Run, gate: Gate, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first before it takes even its copy, and says for how long."""
    first = run.engine.copy()
    run.save(1)
    assert gate.reached.wait(TIMEOUT)
    wait, pieces, done_before_copy = run.saver.wait, run.engine.pieces, []

    def open_and_wait() -> None:
        gate.open(seconds=100)
        wait()

    def note_and_yield() -> Iterator[Piece]:
        done_before_copy.append(run.steps_done)
        yield from pieces()

    monkeypatch.setattr(run.saver, "wait", open_and_wait)
    monkeypatch.setattr(run.engine, "pieces", note_and_yield)
    run.engine.train()
    second = run.engine.copy()
    assert run.save(2) == 100
    assert done_before_copy == [[1]]
    wait()
    assert run.steps_done == [1, 2]
    assert_equal(run.read(1), first)
    assert_equal(run.read(2), second)


def test_the_copy_has_its_place_in_memory_for_good(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[list[int]] = []
    write_shards = checkpoint.write_shards

    def note(path: str, rank: int, pieces: Any, written: Any) -> Any:
        pieces = list(pieces)
        places.append([piece.tensor.data_ptr() for piece in pieces])
        return write_shards(path, rank, pieces, written)

    monkeypatch.setattr(checkpoint, "write_shards", note)
    for step in (1, 2):
        run.save(step)
        run.saver.wait()
    assert places[0] == places[1]
    assert not set(places[0]) & {tensor.data_ptr() for tensor in run.engine.tensors.values()}


def test_in_the_foreground_nothing_is_copied_and_all_is_done_at_once(
    root: str, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    run, places = Run(root, background=False), []
    write_shards = checkpoint.write_shards

    def note(path: str, rank: int, pieces: Any, written: Any) -> Any:
        pieces = list(pieces)
        places.extend(piece.tensor.data_ptr() for piece in pieces)
        gate.open(seconds=100)
        return write_shards(path, rank, pieces, written)

    monkeypatch.setattr(checkpoint, "write_shards", note)
    assert run.save(1) == 100
    assert run.steps_done == [1]
    assert run.done[0].seconds == 100
    assert gate.threads == {threading.get_ident()}
    assert places == [tensor.data_ptr() for tensor in run.engine.tensors.values()]
    run.saver.wait()


def test_waiting_for_nothing(run: Run) -> None:
    run.saver.wait()
    run.save(1)
    run.saver.wait()
    run.saver.wait()
    assert run.steps_done == [1]


def test_nothing_is_left_of_an_interrupted_attempt(run: Run, root: str) -> None:
    stale = Path(root, "step-00000007", "rank-00005-00000.safetensors")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    run.save(7)
    run.saver.wait()
    assert not stale.exists()
    assert_equal(run.read(7), run.engine.tensors)


def test_the_manifest_is_written_when_all_else_is_there(
    run: Run, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    there: list[set[str]] = []
    write_bytes = storage.write_bytes

    def note(path: str, content: bytes) -> None:
        there.append({file.name for file in Path(path).parent.iterdir()})
        write_bytes(path, content)
        written.append(path.rpartition("/")[2])

    monkeypatch.setattr(storage, "write_bytes", note)
    run.save(1)
    run.saver.wait()
    assert written == [*(f"rank-00000-0000{i}.safetensors" for i in range(3)), "manifest.json"]
    assert there[-1] == set(written[:-1])


def test_old_checkpoints_are_pruned(root: str) -> None:
    run = Run(root, keep=2)
    for step, loss in {1: 0.9, 2: 0.1, 3: None, 4: 0.3, 5: 0.2}.items():
        run.save(step, loss)
        run.saver.wait()
        assert step in catalog.steps(root)
    assert catalog.steps(root) == [2, 4, 5]
    assert run.newest()[1].step == 5


def test_what_cannot_be_written_prunes_nothing(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(root, keep=1)
    run.save(1)
    run.saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", fail_with(full()))
        run.save(2)
        run.saver.wait()
    assert catalog.steps(root) == [1]


# ---- what fails -----------------------------------------------------------------------------------


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Makes the file of that number, and all that follow it, fail; some bytes of it may have come to the disk."""
    write_bytes, written = storage.write_bytes, []

    def write(path: str, content: bytes) -> None:
        if len(written) == number:
            Path(path).with_name(".writing-half").write_bytes(content[: len(content) // 2])
            raise error
        written.append(path)
        write_bytes(path, content)

    monkeypatch.setattr(storage, "write_bytes", write)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("number", range(4))  # three shards, and the manifest
def test_a_full_disk_costs_a_warning(
    root: str, small_shards: None, monkeypatch: pytest.MonkeyPatch, background: bool, number: int
) -> None:
    run = Run(root, background=background)
    run.save(1)
    run.saver.wait()
    first = run.engine.copy()
    run.engine.train()
    with monkeypatch.context() as patch:
        fail_at(patch, number, full())
        run.save(2)
        run.saver.wait()
    (warning,) = run.warnings
    assert "step 2 " in warning
    assert "No space left on device" in warning
    assert storage.list_names(root) == ["step-00000001"]
    assert run.steps_done == [1]
    assert run.newest()[1].step == 1
    assert_equal(run.read(1), first)

    run.engine.train()
    run.save(3)
    run.saver.wait()
    assert (run.steps_done, len(run.warnings)) == ([1, 3], 1)
    assert_equal(run.read(3), run.engine.tensors)


class SmallDisk:
    """A disk with room for so many bytes of checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: str, room: int) -> None:
        self.root, self.room, self.write_bytes = Path(root), room, storage.write_bytes
        monkeypatch.setattr(storage, "write_bytes", self.write)

    def write(self, path: str, content: bytes) -> None:
        used = sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())
        if used + len(content) > self.room:
            raise full()
        self.write_bytes(path, content)


def size_of_one(root: str) -> int:
    run = Run(f"{root}-measured")
    run.save(1, 0.5)
    run.saver.wait()
    return storage.size_of(run.root)


@pytest.mark.parametrize("background", [True, False])
def test_older_checkpoints_make_room_for_the_newest(
    root: str, small_shards: None, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """The last one holds what the run was for."""
    SmallDisk(monkeypatch, root, room=int(3.5 * size_of_one(root)))
    run = Run(root, background=background, keep=3)
    for step, loss in enumerate([0.1, 0.4, 0.3, 0.2], 1):
        run.engine.train()
        run.save(step, loss)
        run.saver.wait()
    assert run.warnings == []
    assert catalog.steps(root) == [1, 3, 4], "the best, the one before, and the new one"
    assert_equal(run.read(4), run.engine.tensors)


def test_where_even_that_is_too_little_the_newest_complete_one_stays(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallDisk(monkeypatch, root, room=int(1.5 * size_of_one(root)))
    run = Run(root)
    for step in (1, 2):
        run.save(step)
        run.saver.wait()
    assert len(run.warnings) == 1
    assert catalog.steps(root) == [1]
    assert run.newest()[1].step == 1


def test_a_step_that_failed_can_be_saved_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 0, full())
        run.save(2)
        run.saver.wait()
    run.save(2)
    run.saver.wait()
    assert (run.steps_done, len(run.warnings)) == ([2], 1)
    assert_equal(run.read(2), run.engine.tensors)


@pytest.mark.parametrize("broken", ["make_dir", "delete_dir"])
def test_a_folder_that_cannot_be_made_or_emptied_costs_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    run.save(1)
    run.saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(storage, broken, fail_with(OSError("[Errno 13] Permission denied")))
        run.save(2)
        run.saver.wait()
    assert len(run.warnings) == 1
    assert "step 2 " in run.warnings[0]
    assert "Permission denied" in run.warnings[0]
    assert run.newest()[1].step == 1
    run.save(3)
    run.saver.wait()
    assert run.steps_done == [1, 3]


def test_what_cannot_even_be_cleared_away_is_no_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1)
    run.saver.wait()
    with monkeypatch.context() as patch:
        delete_dir, calls = storage.delete_dir, []

        def fail_from_the_second_time_on(path: str) -> None:
            calls.append(path)
            if len(calls) > 1:
                raise OSError(errno.EIO, "Input/output error")
            delete_dir(path)

        patch.setattr(storage, "delete_dir", fail_from_the_second_time_on)
        fail_at(patch, 0, full())
        run.save(2)
        run.saver.wait()
    assert len(calls) > 1
    assert "No space left on device" in run.warnings[0]
    assert catalog.steps(run.root) == [1, 2]
    passed_over: list[str] = []
    found = checkpoint.newest(run.root, ALONE, passed_over.append)
    assert found is not None
    assert found[1].step == 1
    assert "step-00000002: no manifest" in passed_over[0]
    run.save(3)
    run.saver.wait()
    assert catalog.steps(run.root) == [1, 3]


@pytest.mark.parametrize("background", [True, False])
def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    root: str, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    run = Run(root, background=background, keep=1)
    monkeypatch.setattr(checkpoint, "prune", fail_with(OSError(errno.ENOTEMPTY, "Directory not empty")))
    run.save(1)
    run.saver.wait()
    assert run.steps_done == [1]


@pytest.mark.parametrize("error", [RuntimeError("a rank is gone"), ValueError("a gap"), KeyboardInterrupt()])
def test_what_is_no_matter_of_the_disk_reaches_the_caller(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(catalog, "write_manifest", fail_with(error))
    run.save(1)
    for ask in (run.saver.wait, run.saver.wait, lambda: run.save(2)):
        with pytest.raises(type(error)) as caught:
            ask()
        assert caught.value is error
    assert (run.done, run.warnings) == ([], [])


def test_in_the_foreground_it_reaches_the_caller_at_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(root, background=False)
    monkeypatch.setattr(catalog, "write_manifest", fail_with(RuntimeError("a rank is gone")))
    with pytest.raises(RuntimeError, match="a rank is gone"):
        run.save(1)


def test_a_state_with_a_gap_is_never_called_a_checkpoint(root: str) -> None:
    run = Run(root, background=False)
    del run.engine.tensors["model/b"]
    with pytest.raises(ValueError, match="model/b: its end is missing"):
        run.save(1)
    assert checkpoint.newest(root, ALONE, lambda _: None) is None


# ---- the rehearsal --------------------------------------------------------------------------------


def test_a_rehearsal_writes_reads_and_deletes_a_whole_checkpoint(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = Run(root, engine=FakeEngine(1 << 10, 1 << 9)), [0.0]  # 2 MiB
    verify, load = checkpoint.verify, run.engine.load
    seen: list[Any] = []

    def note(path: str, world: World) -> Manifest:
        now[0] += 5.0
        seen.append((path, storage.list_names(path)))
        return verify(path, world)

    def fill_and_load(read: Read, updates: int) -> None:
        for tensor in run.engine.tensors.values():
            tensor.fill_(float("nan"))  # whatever is not loaded is noticed
        load(read, updates)

    monkeypatch.setattr(saver, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(checkpoint, "verify", note)
    monkeypatch.setattr(run.engine, "load", fill_and_load)
    run.engine.train()
    before = run.engine.copy()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1 << 20)
    text = run.rehearse()
    files = [f"rank-00000-0000{i}.safetensors" for i in range(3)]
    assert seen == [(f"{root}/rehearsal", ["manifest.json", *files])]
    assert run.engine.loads == [1]
    assert_equal(run.engine.tensors, before)
    assert text == "a checkpoint of this run takes 2.0 MiB; one was written in 0.0s and read back in 5.0s"
    assert storage.list_names(root) == []
    assert (run.done, run.warnings) == ([], [])


def test_a_rehearsal_after_one_that_was_interrupted(run: Run, root: str) -> None:
    stale = Path(root, "rehearsal", "rank-00005-00000.safetensors")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    run.rehearse()
    assert storage.list_names(root) == []


def test_a_run_goes_on_from_a_rehearsal(run: Run) -> None:
    run.rehearse()
    run.engine.train()
    run.save(1)
    run.saver.wait()
    assert_equal(run.read(1), run.engine.tensors)


@pytest.mark.parametrize("number", range(4))
def test_a_rehearsal_on_a_full_disk_is_a_matter_for_the_user(
    run: Run, root: str, small_shards: None, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_at(monkeypatch, number, full())
    before = run.engine.copy()
    with pytest.raises(UserError) as caught:
        run.rehearse()
    message = str(caught.value)
    assert message.startswith("run.storage: ")
    assert root in message
    assert "No space left on device" in message
    assert "checkpoint.rehearse=false" in message
    assert storage.list_names(root) == []
    assert run.engine.loads == []
    assert_equal(run.engine.tensors, before)


def test_a_rehearsal_notices_a_disk_that_changes_what_it_is_given(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = storage.write_bytes

    def corrupt(path: str, content: bytes) -> None:
        changed = bytearray(content)
        changed[-1] ^= path.endswith(".safetensors")
        write_bytes(path, bytes(changed))

    monkeypatch.setattr(storage, "write_bytes", corrupt)
    with pytest.raises(UserError, match=r"rehearsal/rank-00000-00000\.safetensors: its content has changed"):
        run.rehearse()
    assert run.engine.loads == []


def test_a_rehearsal_warns_of_a_disk_that_holds_too_few(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=10 << 20)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: usage)
    run.rehearse()
    assert run.warnings == []
    usage.free = 1000
    run.rehearse()
    (warning,) = run.warnings
    assert "checkpoint.keep" in warning
    assert "102 checkpoints" in warning


def forget(engine: FakeEngine) -> None:
    """Leaves the new state as a wrong load would."""
    engine.tensors["exp_avg/a"].zero_()


def shift(engine: FakeEngine) -> None:
    engine.tensors["model/b"].copy_(engine.tensors["model/b"].roll(1))


def exchange(engine: FakeEngine) -> None:
    a, b = engine.tensors["model/a"], engine.tensors["exp_avg/a"]
    engine.tensors |= {"model/a": b, "exp_avg/a": a}


def round_off(engine: FakeEngine) -> None:
    engine.tensors["model/a"].copy_(engine.tensors["model/a"].bfloat16())


@pytest.mark.parametrize("spoil", [forget, shift, exchange, round_off])
def test_a_rehearsal_notices_a_load_that_gives_something_else(
    run: Run, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[FakeEngine], None]
) -> None:
    load = run.engine.load

    def load_wrongly(read: Read, updates: int) -> None:
        load(read, updates)
        spoil(run.engine)

    monkeypatch.setattr(run.engine, "load", load_wrongly)
    with pytest.raises(UserError, match="rehearsal: what was loaded is not what was written"):
        run.rehearse()


# ---- several ranks --------------------------------------------------------------------------------


class RankEngine(FakeEngine):
    """A rank's part of a state that all have."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self._rank, self._size = rank, size

    def pieces(self) -> Iterator[Piece]:
        for piece in super().pieces():
            count = piece.tensor.numel()
            first, last = (count * number // self._size for number in (self._rank, self._rank + 1))
            if first < last:
                yield Piece(piece.name, first, piece.tensor[first:last])


def run_of(root: str, world: World) -> Run:
    return Run(root, engine=RankEngine(world.rank, world.size), world=world)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_rank_cannot_write_no_rank_calls_written(
    root: str, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    write_bytes = storage.write_bytes

    def write(path: str, content: bytes) -> None:
        if f"step-00000002/rank-{rank:05d}" in path:
            raise full()
        write_bytes(path, content)

    monkeypatch.setattr(storage, "write_bytes", write)

    def three_steps(world: World) -> tuple[list[int], list[str]]:
        run = run_of(root, world)
        for step in (1, 2, 3):
            run.engine.train()
            run.save(step)
        run.saver.close()
        return run.steps_done, run.warnings

    for done, warnings in on_ranks(3, three_steps):
        assert done == [1, 3]
        assert len(warnings) == 1
        assert "step 2 " in warnings[0]
        assert "No space left on device" in warnings[0]
    assert catalog.steps(root) == [1, 3]
    assert checkpoint.verify(catalog.directory(root, 3), ALONE).step == 3


def test_a_rehearsal_on_folders_that_the_ranks_do_not_share_names_the_storage(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank finds what it has written itself, and nothing else."""
    open_file = storage.open_file

    def own(path: str) -> Any:
        if threading.current_thread().name not in path:
            raise FileNotFoundError(path)
        return open_file(path)

    monkeypatch.setattr(storage, "open_file", own)

    def rehearse(world: World) -> None:
        threading.current_thread().name = f"rank-{world.rank:05d}"
        run_of(root, world).rehearse()

    for error in on_ranks(2, rehearse, shared=(UserError,)):
        assert isinstance(error, UserError)
        assert "run.storage" in str(error)
        assert "all nodes share" in str(error)
    assert not Path(root, "rehearsal").exists()
