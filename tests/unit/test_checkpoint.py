"""Checkpoints, the run directory and storage: whole or not at all, and damage never goes unnoticed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from raytune_ds import checkpoint, storage
from raytune_ds.checkpoint import CheckpointError, Reader
from raytune_ds.rundir import MetricsFile, RunDir, parse_lines
from raytune_ds.world import World

IDENTITY = {"model": "tiny:qwen2", "adapter": {"r": 8}}
PROGRESS = {"step": 0, "tokens": 12, "last_loss": 1.5, "first_loss": None}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several types and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/a": torch.randn(8, 4, generator=generator),
        "model/b": torch.randn(16, generator=generator).to(torch.bfloat16),
        "exp_avg/a": torch.randn(4, 8, generator=generator).T,
        "step/a": torch.tensor([3.0]),
        "count": torch.tensor([[1, 2], [3, 4]]),
    }


def save(root: Path | str, step: int, **tensors: torch.Tensor) -> str:
    return checkpoint.save(str(root), step, tensors or state(step), IDENTITY, PROGRESS, World.alone())


def refuse_warnings(text: str) -> None:
    raise AssertionError(f"warned: {text}")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def read_all(path: str) -> dict[str, torch.Tensor]:
    reader = Reader(path, checkpoint.verify(path))
    return {name: reader(name) for name in reader.names}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200)


# ---- round trip -----------------------------------------------------------------------------------


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 120)
    assert path == f"{tmp_path}/step-00000120"
    found = checkpoint.newest(str(tmp_path), refuse_warnings)
    assert found is not None
    assert (found[0], found[1].step, found[1].identity, found[1].progress) == (path, 120, IDENTITY, PROGRESS)
    assert_equal(read_all(path), state(120))


def test_the_reader_knows_shapes_and_reads_in_any_order(tmp_path: Path, small_shards: None) -> None:
    path = save(tmp_path, 1)
    reader = Reader(path, checkpoint.read_manifest(path))
    assert reader.names == {name: tensor.shape for name, tensor in state().items()}
    for name in (*reversed(reader.names), *reader.names):
        assert torch.equal(reader(name), state(1)[name])


def test_shards_are_bounded(tmp_path: Path, small_shards: None) -> None:
    tensors = {f"t{i}": torch.full((20,), float(i)) for i in range(6)} | {"large": torch.ones(100)}
    path = save(tmp_path, 1, **tensors)
    shards = [set(file.tensors) for file in checkpoint.read_manifest(path).files]
    # 80 bytes each: two fit into 200. A tensor that fits nowhere has a shard of its own.
    assert shards == [{"t0", "t1"}, {"t2", "t3"}, {"t4", "t5"}, {"large"}]
    assert_equal(read_all(path), tensors)


def test_newest_is_by_step_and_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save(tmp_path, step)
    assert checkpoint.steps(str(tmp_path)) == [5, 20, 100]
    checkpoint.prune(str(tmp_path), keep=2, newest=100)
    assert checkpoint.steps(str(tmp_path)) == [20, 100]
    found = checkpoint.newest(str(tmp_path), refuse_warnings)
    assert found is not None
    assert found[1].step == 100


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-12", "step-00000012.tmp", "xstep-00000012", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(str(tmp_path)) == []
    assert checkpoint.steps(f"{tmp_path}/absent") == []
    assert checkpoint.newest(str(tmp_path), refuse_warnings) is None


def test_what_a_crash_left_half_written_does_not_push_out_good_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 20)
    (
        tmp_path / "step-00000030"
    ).mkdir()  # died while it was written; then the run went on from 20 and saved at 25
    save(tmp_path, 25)
    checkpoint.prune(str(tmp_path), keep=1, newest=25)
    assert checkpoint.steps(str(tmp_path)) == [25]


def test_saving_again_leaves_nothing_of_an_interrupted_attempt(tmp_path: Path) -> None:
    stale = tmp_path / "step-00000007" / "rank-00005-00000.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    path = save(tmp_path, 7)
    assert not stale.exists()
    assert_equal(read_all(path), state(7))


def test_the_manifest_is_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    num_files = len(list(Path(save(tmp_path, 1)).iterdir()))
    assert num_files > 2
    written: list[str] = []
    write_bytes = storage.write_bytes

    def fail_at_the_last(path: str, content: bytes) -> None:
        written.append(path)
        if len(written) == num_files:
            raise OSError("no space left on device")
        write_bytes(path, content)

    monkeypatch.setattr(storage, "write_bytes", fail_at_the_last)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    assert written[-1].endswith("manifest.json")
    warnings: list[str] = []
    found = checkpoint.newest(str(tmp_path), warnings.append)
    assert found is not None
    assert found[1].step == 1
    assert "step-00000002: no manifest" in warnings[0]


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


Damage = Callable[[Path, Path, random.Random], None]


@pytest.mark.parametrize("damage", [truncate, lengthen, flip_a_bit, delete, zero, swap])
def test_damage_to_tensors_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, small_shards: None, damage: Damage
) -> None:
    save(tmp_path, 10)
    for seed in range(20):
        rng = random.Random(seed)
        path = save(tmp_path, 20)
        file, other = rng.sample(sorted(Path(path).glob("*.safetensors")), 2)
        damage(file, other, rng)
        with pytest.raises(CheckpointError, match="step-00000020/rank-"):
            checkpoint.verify(path)
        warnings: list[str] = []
        found = checkpoint.newest(str(tmp_path), warnings.append)
        assert found is not None
        assert found[1].step == 10
        assert len(warnings) == 1
        assert warnings[0].startswith(f"checkpoint passed over: {path}/rank-")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        delete,
        zero,
        flip_a_bit,
    ],
)
def test_damage_to_the_manifest_is_found(tmp_path: Path, damage: Damage) -> None:
    save(tmp_path, 10)
    missed = []
    for seed in range(20):
        path = save(tmp_path, 20)
        damage(Path(path) / "manifest.json", Path(), random.Random(seed))
        found = checkpoint.newest(str(tmp_path), lambda _: None)
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
        checkpoint.verify(path)


def test_damage_after_verification_is_found_when_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reader = Reader(path, checkpoint.verify(path))
    (file,) = Path(path).glob("*.safetensors")
    flip_a_bit(file, file, random.Random(0))
    with pytest.raises(CheckpointError, match="checksum"):
        reader("model/a")


# ---- the run directory ----------------------------------------------------------------------------


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run.metrics).read_text().splitlines()]


def test_after_a_restart_each_step_is_there_once(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    first = MetricsFile(run, last_step=-1)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
        if step == 3:
            first.write({"step": 3, "eval_loss": 0.5})
    # It died behind step 5, and the newest checkpoint is of step 3.
    second = MetricsFile(run, last_step=3)
    assert [row["step"] for row in lines(run)] == [1, 2, 3, 3]
    second.write({"step": 4, "loss": 9.0})
    second.close()
    assert [(row["step"], row.get("loss")) for row in run.read_metrics()] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (3, None), (4, 9.0),
    ]  # fmt: skip


def test_a_new_run_begins_with_an_empty_file(tmp_path: Path) -> None:
    run = RunDir(f"{tmp_path}/new/run")
    assert run.read_metrics() == []
    MetricsFile(run, last_step=-1).close()
    assert Path(run.metrics).read_bytes() == b""


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_line_that_was_not_finished_is_passed_over(tmp_path: Path, cut: int) -> None:
    run = RunDir(str(tmp_path))
    whole = b'{"step": 1, "loss": 2.5}\n'
    Path(run.metrics).write_bytes(whole + b'{"step": 2, "loss": 2.5}\n'[:cut])
    assert run.read_metrics() == [{"step": 1, "loss": 2.5}]
    file = MetricsFile(run, last_step=2)
    file.write({"step": 3})
    file.close()
    assert [row["step"] for row in lines(run)] == [1, 3]


def test_a_finished_last_line_counts() -> None:
    assert parse_lines(b'{"step": 1}\n{"step": 2}\n') == [{"step": 1}, {"step": 2}]
    assert parse_lines(b"") == []


def test_rows_are_there_at_once_for_others_to_read(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    file = MetricsFile(run, last_step=-1)
    file.write({"step": 1})
    assert run.read_metrics() == [{"step": 1}]
    file.close()


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


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Something that is reached by a URI only, so that nothing may go around pyarrow."""
    root = tmp_path / "bucket"
    root.mkdir()
    store = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
    local = storage.open_filesystem

    def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
        inside = path.removeprefix("mem://")
        return (store, inside.rstrip("/")) if inside != path else local(path)

    monkeypatch.setattr(storage, "open_filesystem", open_filesystem)
    return "mem://runs"


def test_an_object_store_holds_checkpoints_and_metrics(
    bucket: str, tmp_path: Path, small_shards: None
) -> None:
    run = RunDir(f"{bucket}/one")
    for step in (1, 2):
        path = save(run.checkpoints, step)
    assert_equal(read_all(path), state(2))
    (tmp_path / "bucket/runs/one/checkpoints/step-00000002/manifest.json").unlink()
    warnings: list[str] = []
    found = checkpoint.newest(run.checkpoints, warnings.append)
    assert found is not None
    assert (found[1].step, len(warnings)) == (1, 1)
    checkpoint.prune(run.checkpoints, keep=1, newest=2)
    assert checkpoint.steps(run.checkpoints) == [1], "the one without a manifest goes"

    file = MetricsFile(run, last_step=-1)
    file.write({"step": 1})
    file.write({"step": 2})
    file.flush()
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    file = MetricsFile(run, last_step=1)
    file.write({"step": 2, "again": True})
    file.close()
    assert run.read_metrics() == [{"step": 1}, {"step": 2, "again": True}]

    (tmp_path / "final/sub").mkdir(parents=True)
    (tmp_path / "final/sub/x").write_bytes(b"1")
    storage.upload_dir(tmp_path / "final", run.final)
    assert storage.read_bytes(f"{run.final}/sub/x") == b"1"
    storage.check_writable(bucket)
    assert storage.list_names(bucket) == ["one"]
