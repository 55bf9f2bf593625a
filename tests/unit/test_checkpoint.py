"""Checkpoints and storage: whole or not at all, and damage never goes unnoticed."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds import catalog, checkpoint, storage
from raytune_ds.catalog import CheckpointError, Manifest, ShardFile
from raytune_ds.checkpoint import Reader
from raytune_ds.engines import Piece
from raytune_ds.rundir import RunDir
from raytune_ds.world import World
from tests.ranks import on_ranks

IDENTITY = {"model": "tiny:qwen2", "adapter": {"r": 8}}
PROGRESS = {"step": 0, "tokens": 12, "last_loss": 1.5, "first_loss": None}
ALONE = World.alone()

State = dict[str, torch.Tensor]


def state(seed: int = 0) -> State:
    """Float32 tensors of several shapes; 64 elements or 256 bytes in all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model/a": (8, 4), "model/b": (16,), "exp_avg/a": (5, 3), "model/one": (), "model/none": (0, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pieces(tensors: State, rank: int = 0, size: int = 1) -> Iterator[Piece]:
    """The share of a rank: as much of every tensor as the others have."""
    for name, tensor in tensors.items():
        first, last = tensor.numel() * rank // size, tensor.numel() * (rank + 1) // size
        yield Piece(name, first, tensor.reshape(-1)[first:last])


def manifest_of(step: int, tensors: State, files: Sequence[ShardFile], loss: float | None = None) -> Manifest:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Manifest(step, step - 1, IDENTITY, PROGRESS, loss, shapes, tuple(files))


def save(
    root: Path | str, step: int, tensors: State | None = None, ranks: int = 1, loss: float | None = None
) -> str:
    """A whole checkpoint, as `ranks` ranks write it."""
    path, tensors = catalog.directory(str(root), step), state(step) if tensors is None else tensors
    storage.delete_dir(path)
    files: list[ShardFile] = []
    for rank in range(ranks):
        files += checkpoint.write_shards(path, rank, pieces(tensors, rank, ranks))
    catalog.write_manifest(path, manifest_of(step, tensors, files, loss))
    return path


def read_all(path: str) -> State:
    reader = Reader(path, checkpoint.verify(path, ALONE))
    return {name: reader.whole(name) for name in reader.shapes}


def refuse_warnings(text: str) -> None:
    raise AssertionError(f"warned: {text}")


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)


# ---- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_saved_is_read_back(tmp_path: Path, small_shards: None, ranks: int) -> None:
    path = save(tmp_path, 120, ranks=ranks, loss=0.25)
    assert path == f"{tmp_path}/step-00000120"
    found = checkpoint.newest(str(tmp_path), ALONE, refuse_warnings)
    assert found is not None
    assert found[0] == path
    manifest = found[1]
    assert (manifest.step, manifest.updates, manifest.eval_loss) == (120, 119, 0.25)
    assert (manifest.identity, manifest.progress) == (IDENTITY, PROGRESS)
    assert manifest.size == sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    assert_equal(read_all(path), state(120))


def test_the_reader_knows_shapes_and_reads_in_any_order(tmp_path: Path, small_shards: None) -> None:
    path = save(tmp_path, 1)
    reader = Reader(path, catalog.read_manifest(path))
    assert reader.shapes == {name: tensor.shape for name, tensor in state(1).items()}
    for name in (*reversed(reader.shapes), *reader.shapes):
        assert torch.equal(reader.whole(name), state(1)[name])
        assert torch.equal(reader(name, 0, reader.shapes[name].numel()), state(1)[name].reshape(-1))


def test_files_are_bounded_and_tensors_are_cut_to_fill_them(tmp_path: Path, small_shards: None) -> None:
    tensors = {f"t{i}": torch.arange(10.0) + i for i in range(3)} | {"large": torch.arange(60.0)}
    files = catalog.read_manifest(save(tmp_path, 1, tensors)).files
    # 100 bytes are 25 elements.
    assert [file.ranges for file in files] == [
        {"t0": [0, 10], "t1": [0, 10], "t2": [0, 5]},
        {"t2": [5, 10], "large": [0, 20]},
        {"large": [20, 45]},
        {"large": [45, 60]},
    ]
    assert [file.name for file in files] == [f"rank-00000-0000{i}.safetensors" for i in range(4)]
    assert_equal(read_all(f"{tmp_path}/step-00000001"), tensors)


def test_a_file_that_is_just_full_is_followed_by_no_empty_one(tmp_path: Path, small_shards: None) -> None:
    assert [f.ranges for f in catalog.read_manifest(save(tmp_path, 1, {"t": torch.ones(50)})).files] == [
        {"t": [0, 25]},
        {"t": [25, 50]},
    ]


def test_a_rank_with_nothing_to_write_writes_nothing(tmp_path: Path) -> None:
    assert checkpoint.write_shards(str(tmp_path), 7, []) == []
    assert checkpoint.write_shards(str(tmp_path), 7, [Piece("a", 3, torch.ones(0))]) == []
    assert list(tmp_path.iterdir()) == []


def test_files_are_plain_safetensors_that_other_tools_open(tmp_path: Path) -> None:
    path = save(tmp_path, 1, ranks=2)
    first, second = (safetensors.torch.load_file(file) for file in sorted(Path(path).glob("*.safetensors")))
    assert torch.equal(torch.cat([first["model/b"], second["model/b"]]), state(1)["model/b"])


def test_all_is_kept_in_float32_whatever_it_was_and_wherever_it_lay(tmp_path: Path) -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    columns, half, wide = matrix[:, 1], matrix.bfloat16().reshape(-1), matrix.double().reshape(-1)
    assert not columns.is_contiguous()
    files = checkpoint.write_shards(
        str(tmp_path), 0, [Piece("columns", 0, columns), Piece("half", 0, half), Piece("wide", 0, wide)]
    )
    expected = {"columns": columns.clone(), "half": half.float(), "wide": wide.float()}
    (file,) = tmp_path.iterdir()
    assert {tensor.dtype for tensor in safetensors.torch.load_file(file).values()} == {torch.float32}
    reader = Reader(str(tmp_path), manifest_of(1, expected, files))
    assert_equal({name: reader.whole(name) for name in expected}, expected)


def test_writing_needs_memory_for_one_file_at_a_time(tmp_path: Path, small_shards: None) -> None:
    on_disk = []

    def asked_for() -> Iterator[Piece]:
        for number in range(4):
            on_disk.append(len(list(tmp_path.iterdir())))
            yield Piece(f"t{number}", 0, torch.ones(25))

    checkpoint.write_shards(str(tmp_path), 0, asked_for())
    assert on_disk == [0, 1, 2, 3]


def test_a_reader_opens_no_file_that_it_does_not_need(tmp_path: Path, small_shards: None) -> None:
    path = save(tmp_path, 1, {"t": torch.arange(75.0)})
    reader = Reader(path, catalog.read_manifest(path))
    for number in (0, 2):
        Path(f"{path}/rank-00000-0000{number}.safetensors").unlink()
    assert reader("t", 25, 50).tolist() == list(range(25, 50))
    assert reader("t", 10, 10).numel() == 0
    with pytest.raises(FileNotFoundError, match="rank-00000-00002"):
        reader("t", 49, 51)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_range_is_read_back_however_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3))
    ranks = data.draw(st.integers(1, 4))
    path, count, files, tensors = str(tmp_path_factory.mktemp("cut")), 0, [], {}
    shares: list[list[Piece]] = [[] for _ in range(ranks)]
    for number, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        tensors[f"t/{number}"] = torch.arange(count, count + size, dtype=torch.float32).view(shape)
        count += size
        cuts = [
            0,
            *sorted(data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))),
            size,
        ]
        for rank, owner in enumerate(data.draw(st.permutations(range(ranks)))):
            start, stop = cuts[rank], cuts[rank + 1]
            piece = Piece(f"t/{number}", start, tensors[f"t/{number}"].reshape(-1)[start:stop])
            shares[owner] += [piece] if start < stop else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", data.draw(st.integers(1, 40)) * 4)
        for rank, share in enumerate(shares):
            files += checkpoint.write_shards(path, rank, share)
        limit = checkpoint.SHARD_BYTES // 4
    assert all(sum(stop - start for start, stop in file.ranges.values()) <= limit for file in files)
    # The order of the files does not matter.
    catalog.write_manifest(path, manifest_of(1, tensors, data.draw(st.permutations(files))))
    manifest = checkpoint.verify(path, ALONE)
    reader = Reader(path, manifest)
    for name, tensor in tensors.items():
        assert torch.equal(reader.whole(name), tensor)
        start = data.draw(st.integers(0, tensor.numel()))
        stop = data.draw(st.integers(start, tensor.numel()))
        assert torch.equal(reader(name, start, stop), tensor.reshape(-1)[start:stop])


# ---- which one is taken ---------------------------------------------------------------------------


def test_the_newest_is_by_step(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save(tmp_path, step)
    assert catalog.steps(str(tmp_path)) == [5, 20, 100]
    found = checkpoint.newest(str(tmp_path), ALONE, refuse_warnings)
    assert found is not None
    assert found[1].step == 100


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-12", "step-00000012.tmp", "xstep-00000012", "rehearsal", "notes"):
        (tmp_path / name).mkdir()
    assert catalog.steps(str(tmp_path)) == []
    assert catalog.steps(f"{tmp_path}/absent") == []
    assert checkpoint.newest(str(tmp_path), ALONE, refuse_warnings) is None


def test_one_without_a_manifest_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    Path(save(tmp_path, 20), "manifest.json").unlink()
    (tmp_path / "step-00000030").mkdir()
    warnings: list[str] = []
    found = checkpoint.newest(str(tmp_path), ALONE, warnings.append)
    assert found is not None
    assert found[1].step == 10
    assert len(warnings) == 2
    assert "step-00000030: no manifest" in warnings[0]
    assert "step-00000020: no manifest" in warnings[1]


def test_one_under_the_name_of_another_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    Path(save(tmp_path, 20)).rename(tmp_path / "step-00000040")
    warnings: list[str] = []
    found = checkpoint.newest(str(tmp_path), ALONE, warnings.append)
    assert found is not None
    assert found[1].step == 10
    assert warnings == [f"checkpoint passed over: {tmp_path}/step-00000040: holds step 20"]


# ---- cleaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "keep", "left"),
    [
        ({5: None, 20: None, 100: None}, 2, [20, 100]),
        ({5: None, 20: None, 100: None}, 9, [5, 20, 100]),
        ({1: 0.9, 2: 0.5, 3: 0.7, 4: 0.8}, 1, [2, 4]),
        ({1: 0.9, 2: 0.5, 3: 0.7, 4: 0.4}, 1, [4]),
        ({1: 0.9, 2: 0.5, 3: None, 4: None}, 2, [2, 3, 4]),
        ({1: None, 2: 0.5, 3: 0.6, 4: None}, 1, [2, 4]),
        ({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.6}, 1, [3, 4]),  # of equal ones the newest
        ({1: -0.1, 2: 0.0, 3: 0.6}, 1, [1, 3]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(
    tmp_path: Path, losses: dict[int, float | None], keep: int, left: list[int]
) -> None:
    for step, loss in losses.items():
        save(tmp_path, step, loss=loss)
    checkpoint.prune(str(tmp_path), keep, newest=max(losses))
    assert catalog.steps(str(tmp_path)) == left
    for step in left:
        assert_equal(read_all(catalog.directory(str(tmp_path), step)), state(step))


def test_a_loss_that_is_not_a_number_is_not_the_best(tmp_path: Path) -> None:
    for step, loss in {1: float("nan"), 2: 0.5, 3: 0.6}.items():
        save(tmp_path, step, loss=loss)
    checkpoint.prune(str(tmp_path), 1, newest=3)
    assert catalog.steps(str(tmp_path)) == [2, 3]


def test_what_a_crash_left_half_written_does_not_push_out_good_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 20)
    # Died while it was written; then the run went on from 20 and saved at 25.
    Path(save(tmp_path, 22), "manifest.json").unlink()
    (tmp_path / "step-00000030").mkdir()
    save(tmp_path, 25)
    checkpoint.prune(str(tmp_path), keep=2, newest=25)
    assert catalog.steps(str(tmp_path)) == [20, 25]


def test_what_is_newer_than_the_run_goes(tmp_path: Path) -> None:
    # It was damaged, so the run went on from an older one; its loss and age count for nothing.
    for step, loss in {10: 0.9, 20: 0.8, 30: 0.1}.items():
        save(tmp_path, step, loss=loss)
    checkpoint.prune(str(tmp_path), keep=1, newest=20)
    assert catalog.steps(str(tmp_path)) == [20]


def test_pruning_leaves_everything_else_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "notes").mkdir()
    checkpoint.prune(str(tmp_path), keep=1, newest=1)
    checkpoint.prune(f"{tmp_path}/absent", keep=1, newest=1)
    assert storage.list_names(str(tmp_path)) == ["notes", "step-00000001"]


def test_one_that_could_not_be_read_this_once_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    read_bytes = storage.read_bytes

    def fail_once(path: str) -> bytes:
        monkeypatch.setattr(storage, "read_bytes", read_bytes)
        raise OSError(errno.ETIMEDOUT, "the store did not answer")

    monkeypatch.setattr(storage, "read_bytes", fail_once)
    checkpoint.prune(str(tmp_path), keep=2, newest=2)
    assert catalog.steps(str(tmp_path)) == [1, 2]


# ---- damage ---------------------------------------------------------------------------------------


def truncate(file: Path, other: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def lengthen(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + bytes(rng.randrange(1, 9)))


def flip_a_bit(file: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def delete(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def zero(file: Path, other: Path, rng: random.Random) -> None:
    # What a file system shows after a power cut: the length is there, the content is not.
    content = file.read_bytes()
    start = rng.randrange(len(content) // 2)
    file.write_bytes(content[:start] + bytes(len(content) - start))


def swap(file: Path, other: Path, rng: random.Random) -> None:
    a, b = file.read_bytes(), other.read_bytes()
    file.write_bytes(b)
    other.write_bytes(a)


def make_foreign(file: Path, other: Path, rng: random.Random) -> None:
    # Of the checkpoint before: the same names, shapes and size.
    old = file.parent.parent / "step-00000010" / file.name
    assert old.stat().st_size == file.stat().st_size
    file.write_bytes(old.read_bytes())


def make_a_folder(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


Damage = Callable[[Path, Path, random.Random], None]


@pytest.mark.parametrize(
    "damage", [truncate, lengthen, flip_a_bit, delete, zero, swap, make_foreign, make_a_folder]
)
def test_damage_to_tensors_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, small_shards: None, damage: Damage
) -> None:
    save(tmp_path, 10, ranks=2)
    for seed in range(10):
        rng = random.Random(seed)
        path = save(tmp_path, 20, ranks=2)
        file, other = rng.sample(sorted(Path(path).glob("*.safetensors")), 2)
        damage(file, other, rng)
        named = sorted({file.name, other.name} if damage is swap else {file.name})
        with pytest.raises(CheckpointError) as caught:
            checkpoint.verify(path, ALONE)
        assert str(caught.value).startswith(f"{path}/{named[0]}: ")
        if damage in (truncate, lengthen):
            size = next(f.size for f in catalog.read_manifest(path).files if f.name == file.name)
            assert str(caught.value).endswith(f": {file.stat().st_size} bytes, should be {size}")
        warnings: list[str] = []
        found = checkpoint.newest(str(tmp_path), ALONE, warnings.append)
        assert found is not None
        assert found[1].step == 10
        assert warnings == [f"checkpoint passed over: {caught.value}"]


def test_of_a_thousand_random_damages_each_is_found(tmp_path: Path, small_shards: None) -> None:
    """To any file of a checkpoint, its manifest too."""
    save(tmp_path, 10, ranks=2)
    path = Path(save(tmp_path, 20, ranks=2))
    whole = {file: file.read_bytes() for file in path.iterdir()}
    missed = []
    for seed in range(1000):
        rng = random.Random(seed)
        damage = rng.choice([truncate, flip_a_bit, delete, swap, zero])
        touched = rng.sample(sorted(whole), 2)
        damage(*touched, rng)
        warnings: list[str] = []
        found = checkpoint.newest(str(tmp_path), ALONE, warnings.append)
        if found is None or found[1].step != 10 or len(warnings) != 1:
            missed.append((seed, damage.__name__))
        for file in touched:
            file.write_bytes(whole[file])
    assert missed == []
    newest = checkpoint.newest(str(tmp_path), ALONE, refuse_warnings)
    assert newest is not None
    assert newest[1].step == 20


@pytest.mark.parametrize("damage", [truncate, delete, zero, flip_a_bit])
def test_damage_to_the_manifest_is_found(tmp_path: Path, damage: Damage) -> None:
    save(tmp_path, 10)
    missed = []
    for seed in range(20):
        path = save(tmp_path, 20)
        damage(Path(path) / "manifest.json", Path(), random.Random(seed))
        found = checkpoint.newest(str(tmp_path), ALONE, lambda _: None)
        missed += [seed] if found is None or found[1].step != 10 else []
    assert missed == []


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": [{"name": "x"}]}',
        '{"files": [], "nonsense": 1}',
        "\xff",
        "null",
    ],
)
def test_a_manifest_that_makes_no_sense_is_damage(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, 1)
    (Path(path) / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        checkpoint.verify(path, ALONE)


def rewrite(path: str, **changes: Any) -> None:
    """A manifest whose own checksum is right, and its content is not."""
    values = {**storage.read_json(f"{path}/manifest.json"), **changes}
    del values["checksum"]
    storage.write_json(f"{path}/manifest.json", {**values, "checksum": catalog._checksum_of(values)})


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused(tmp_path: Path, version: int) -> None:
    path = save(tmp_path, 1)
    rewrite(path, version=version)
    with pytest.raises(
        CheckpointError,
        match=rf"is of version {version}, and this package reads 2",
    ):
        checkpoint.verify(path, ALONE)


@pytest.mark.parametrize(
    "changes",
    [
        {"nonsense": 1},
        {"files": 3},
        {"files": [{"name": "x"}]},
        {"shapes": {}},
        {"shapes": None},
        {"files": []},
    ],
)
def test_a_manifest_that_fits_its_checksum_but_makes_no_sense(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = save(tmp_path, 1)
    rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        checkpoint.verify(path, ALONE)


def test_truncation_after_verification_is_found_when_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"t": torch.ones(100)})
    reader, begun = (Reader(path, checkpoint.verify(path, ALONE)) for _ in range(2))
    assert begun("t", 0, 3).tolist() == [1, 1, 1]
    (file,) = Path(path).glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises((OSError, ValueError)):
        reader.whole("t")
    with pytest.raises(OSError, match=f"{file.name}: ends too early"):
        begun.whole("t")


# ---- whether it is whole --------------------------------------------------------------------------

SHAPES = {"a": [3, 4], "b": [], "none": [0]}


def covering(*ranges: tuple[str, int, int]) -> Manifest:
    """One file a range."""
    files = tuple(ShardFile(f"{i}", 0, "", {name: [a, b]}) for i, (name, a, b) in enumerate(ranges))
    return Manifest(1, 1, {}, {}, None, SHAPES, files)


def test_ranges_in_any_order_make_a_whole() -> None:
    covering(("a", 5, 12), ("b", 0, 1), ("a", 0, 5)).require_whole()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([("a", 0, 12)], "b: its end is missing"),
        ([("a", 0, 11), ("b", 0, 1)], "a: its end is missing"),
        ([("a", 0, 13), ("b", 0, 1)], "a: its end is missing"),
        ([("a", 1, 12), ("b", 0, 1)], "a: elements 0 to 1 are missing or there twice"),
        ([("a", 0, 5), ("a", 7, 12), ("b", 0, 1)], "a: elements 5 to 7 are missing or there twice"),
        ([("a", 0, 7), ("a", 5, 12), ("b", 0, 1)], "a: elements 5 to 7 are missing or there twice"),
        ([("a", 0, 12), ("a", 0, 12), ("b", 0, 1)], "a: elements 0 to 12 are missing or there twice"),
        ([("a", 0, 12), ("a", 3, 4), ("b", 0, 1)], "a: elements 3 to 12 are missing or there twice"),
        ([("a", 0, 12), ("b", 0, 1), ("none", 0, 1)], "none: its end is missing"),
    ],
)
def test_gaps_and_overlaps_are_refused(
    tmp_path: Path, ranges: list[tuple[str, int, int]], message: str
) -> None:
    manifest = covering(*ranges)
    with pytest.raises(ValueError, match=f"^{message}"):
        manifest.require_whole()
    with pytest.raises(ValueError, match=f"^{message}"):
        catalog.write_manifest(str(tmp_path), manifest)
    assert list(tmp_path.iterdir()) == [], "not a checkpoint"
    storage.write_json(f"{tmp_path}/manifest.json", manifest.to_json())
    with pytest.raises(CheckpointError, match=f"manifest.json: damaged: {message}"):
        catalog.read_manifest(str(tmp_path))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_only_a_whole_is_whole(data: st.DataObject) -> None:
    parts = st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] < p[1])
    ranges = data.draw(st.lists(parts, max_size=4))
    manifest = replace(covering(*[("a", a, b) for a, b in ranges]), shapes={"a": [6]})
    counts = [sum(a <= element < b for a, b in ranges) for element in range(6)]
    try:
        manifest.require_whole()
        assert counts == [1] * 6
    except ValueError:
        assert counts != [1] * 6


def test_a_manifest_survives_being_written(tmp_path: Path) -> None:
    made = replace(covering(("a", 0, 12), ("b", 0, 1)), eval_loss=1 / 3, progress={"loss": 0.1, "n": None})
    catalog.write_manifest(str(tmp_path), made)
    read = catalog.read_manifest(str(tmp_path))
    assert read == made
    assert read.to_json() == made.to_json()


# ---- several ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(5))
def test_all_ranks_hear_of_damage_that_one_of_them_finds(
    tmp_path: Path, small_shards: None, number: int
) -> None:
    save(tmp_path, 10, ranks=2)
    path = save(tmp_path, 20, ranks=2)
    files = [file.name for file in catalog.read_manifest(path).files]
    assert len(files) == 4
    assert on_ranks(3, lambda world: checkpoint.verify(path, world).step, (CheckpointError,)) == [20, 20, 20]
    name = [*files, "manifest.json"][number]
    flip_a_bit(Path(path, name), Path(), random.Random(number))
    errors = on_ranks(3, lambda world: checkpoint.verify(path, world), (CheckpointError,))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert name in str(errors[0])
    warnings: list[str] = []
    found = on_ranks(
        3, lambda world: checkpoint.newest(str(tmp_path), world, warnings.append), (CheckpointError,)
    )
    assert [(place, manifest.step) for place, manifest in found] == [(f"{tmp_path}/step-00000010", 10)] * 3
    assert len(warnings) == 3


def test_the_ranks_share_the_reading(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, ranks=2)
    opened: list[str] = []
    open_file = storage.open_file

    def note(path: str) -> Any:
        opened.append(path.rpartition("/")[2])
        return open_file(path)

    monkeypatch.setattr(storage, "open_file", note)
    on_ranks(3, lambda world: checkpoint.verify(path, world))
    assert sorted(opened) == sorted(file.name for file in Path(path).glob("*.safetensors"))


def test_no_rank_reads_what_it_has_written_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own page cache, or a folder that only its node sees, would tell it that all is well."""
    path = save(tmp_path, 1, ranks=3)
    opened: list[tuple[str, str]] = []
    open_file = storage.open_file

    def note(path: str) -> Any:
        opened.append((threading.current_thread().name, path.rpartition("/")[2]))
        return open_file(path)

    def verify(world: World) -> None:
        threading.current_thread().name = f"rank-{world.rank:05d}"
        checkpoint.verify(path, world)

    monkeypatch.setattr(storage, "open_file", note)
    on_ranks(3, verify)
    assert len(opened) == 3
    assert not [1 for reader, file in opened if file.startswith(reader)]


# ---- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = f"{tmp_path}/a.json"
    storage.write_json(path, {"old": "旧"})

    def fail(*_: Any) -> None:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(Path, broken, fail)
        with pytest.raises(OSError, match="disk on fire"):
            storage.write_json(path, {"new": 1})
    assert storage.read_json(path) == {"old": "旧"}
    assert storage.list_names(str(tmp_path)) == ["a.json"]  # and no scratch file beside it


@pytest.mark.parametrize(
    ("number", "tries"), [(errno.EIO, 3), (errno.ESTALE, 3), (errno.ENOSPC, 1), (errno.EACCES, 1)]
)
def test_what_may_pass_is_tried_again_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tries: int
) -> None:
    """A full disk stays full, and whoever waits for it could make room instead."""
    tried: list[int] = []

    def fail(handle: int) -> None:
        tried.append(handle)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        storage.write_bytes(f"{tmp_path}/file", b"content")
    assert len(tried) == tries
    assert list(tmp_path.iterdir()) == []


def test_nobody_sees_a_file_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    storage.write_bytes(str(path), b"old")
    seen: list[bytes] = []
    replace = Path.replace

    def look(self: Path, target: str) -> Path:
        seen.append(path.read_bytes())
        assert self.read_bytes() == b"new"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    storage.write_bytes(str(path), b"new")
    assert (seen, path.read_bytes()) == ([b"old"], b"new")
    assert path.stat().st_mode & 0o777 == 0o644  # others may read it, not only its owner


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("~/runs") == storage.absolute("runs") == f"{tmp_path}/runs"
    assert storage.absolute(f"file://{tmp_path}/runs") == f"{tmp_path}/runs"
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    assert [storage.is_local(p) for p in ("runs", "/runs", "file:///runs", "s3://b/runs")] == [True] * 3 + [
        False
    ]


def test_what_is_not_there(tmp_path: Path) -> None:
    path = f"{tmp_path}/absent"
    assert not storage.exists(path)
    assert storage.read_json(path) is None
    assert storage.list_names(path) == []
    storage.delete_dir(path)
    with pytest.raises(OSError, match="absent"):
        storage.read_bytes(path)


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    storage.check_writable(f"{tmp_path}/runs")
    assert storage.list_names(f"{tmp_path}/runs") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        storage.check_writable(f"{tmp_path}/file/runs")


def test_an_object_store_holds_checkpoints(bucket: str, tmp_path: Path, small_shards: None) -> None:
    run = RunDir(f"{bucket}/one")
    for step in (1, 2):
        path = save(run.checkpoints, step, ranks=2)
    assert_equal(read_all(path), state(2))
    (tmp_path / "bucket/runs/one/checkpoints/step-00000002/manifest.json").unlink()
    warnings: list[str] = []
    found = checkpoint.newest(run.checkpoints, ALONE, warnings.append)
    assert found is not None
    assert (found[1].step, len(warnings)) == (1, 1)
    checkpoint.prune(run.checkpoints, keep=1, newest=2)
    assert catalog.steps(run.checkpoints) == [1], "the one without a manifest goes"

    (tmp_path / "final/sub").mkdir(parents=True)
    (tmp_path / "final/sub/x").write_bytes(b"1")
    storage.upload_dir(tmp_path / "final", run.final)
    assert storage.read_bytes(f"{run.final}/sub/x") == b"1"
    storage.check_writable(bucket)
    assert storage.list_names(bucket) == ["one"]


def test_a_loss_that_is_not_a_number_leaves_the_checkpoint_readable(tmp_path: Path) -> None:
    """The loss of a skipped step is NaN, which JSON does not have."""
    manifest = catalog.Manifest(1, 1, {}, {"last_loss": float("nan"), "tokens": 5}, float("inf"), {}, ())
    catalog.write_manifest(str(tmp_path), manifest)
    found = catalog.read_manifest(str(tmp_path))
    assert (found.progress, found.eval_loss) == ({"last_loss": None, "tokens": 5}, None)
