"""Checkpoints: safetensors and JSON, written by the ranks side by side, complete once their manifest is there.

    checkpoints/step-00000120/
        rank-00000-00000.safetensors ...   flat float32 ranges of tensors, by name, in files of bounded size
        manifest.json                      shapes, and size, checksum and ranges of every file; written last

No manifest, no checkpoint. Each rank writes the ranges that it keeps, and reads those that it will keep: nothing in a
checkpoint depends on the engine or the number of ranks that wrote it, and no rank ever needs a whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import safetensors.torch
import torch
import xxhash

from raytune_ds import storage
from raytune_ds.catalog import (
    CheckpointError,
    Manifest,
    OtherVersion,
    ShardFile,
    directory,
    read_manifest,
    steps,
)
from raytune_ds.engines import Piece
from raytune_ds.errors import UserError
from raytune_ds.tensorfile import TensorFile
from raytune_ds.world import World

SHARD_BYTES = 256 << 20


# ---------------------------------------------------------------------------------------------- writing


def write_shards(
    path: str, rank: int, pieces: Iterable[Piece], written: Callable[[], None] = lambda: None
) -> list[ShardFile]:
    """Writes a rank's pieces below `path`, with memory for two files of them at a time; `written` is called for each.

    Raises:
        OSError: they can't be written.
    """
    files = []
    for number, shard in enumerate(_shards(pieces)):
        files.append(_write_shard(path, rank, number, shard))
        written()
    return files


def _shards(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces gathered, and cut, to files of SHARD_BYTES."""
    shard: list[Piece] = []
    room = SHARD_BYTES // 4
    for piece in pieces:
        done = 0
        while done < piece.tensor.numel():
            part = piece.tensor[done : done + room]
            shard.append(Piece(piece.name, piece.start + done, part))
            done += part.numel()
            room -= part.numel()
            if room == 0:
                yield shard
                shard, room = [], SHARD_BYTES // 4
    if shard:
        yield shard


def _write_shard(path: str, rank: int, number: int, pieces: list[Piece]) -> ShardFile:
    name = f"rank-{rank:05d}-{number:05d}.safetensors"
    content = safetensors.torch.save({p.name: p.tensor.float().cpu().contiguous() for p in pieces})
    storage.write_bytes(f"{path}/{name}", content)
    ranges = {p.name: [p.start, p.start + p.tensor.numel()] for p in pieces}
    return ShardFile(name, len(content), xxhash.xxh3_128_hexdigest(content), ranges)


# ---------------------------------------------------------------------------------------------- reading


def verify(path: str, world: World) -> Manifest:
    """Reads all of a checkpoint, each rank a part, and compares it with its manifest. A collective.

    The ranks wrote the files in the order of the manifest, and each reads what the next one wrote: a folder that each
    node has for itself is noticed.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the same on all ranks.
    """
    manifest = error = None
    if world.is_main:  # the others may see an older state of a shared folder
        try:
            manifest = read_manifest(path)
        except CheckpointError as caught:
            error = str(caught)
    manifest, error = world.broadcast((manifest, error))
    if manifest is None:
        raise CheckpointError(error)
    try:
        for file in manifest.files[(world.rank + 1) % world.size :: world.size]:
            _verify_file(path, file)
    except CheckpointError as caught:
        error = str(caught)
    if errors := [text for text in world.gather(error) if text]:
        raise CheckpointError(errors[0])
    return manifest


def _verify_file(path: str, file: ShardFile) -> None:
    digest, size = xxhash.xxh3_128(), 0
    try:
        with storage.open_file(f"{path}/{file.name}") as stream:
            while block := stream.read(16 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise CheckpointError(f"{path}/{file.name}: can't be read: {error}") from error
    if size != file.size:
        raise CheckpointError(f"{path}/{file.name}: {size} bytes, should be {file.size}")
    if digest.hexdigest() != file.checksum:
        raise CheckpointError(f"{path}/{file.name}: its content has changed (checksum differs)")


def newest(
    root: str, world: World, warn: Callable[[str], None], below: int | None = None
) -> tuple[str, Manifest] | None:
    """The newest checkpoint that verifies; `warn` hears of those that do not. A collective.

    With `below`, the newest of a lower step, or else the oldest there is.

    Raises:
        UserError: there are finished ones, and none of them verifies: to begin anew would delete them.
    """
    passed_over: list[str] = []
    for step in world.broadcast(_newest_first(root, below) if world.is_main else None):
        path = directory(root, step)
        try:
            manifest = verify(path, world)
            if manifest.step != step:
                raise CheckpointError(f"{path}: holds step {manifest.step}")
            return path, manifest
        except CheckpointError as error:
            if world.broadcast(storage.exists(f"{path}/manifest.json") if world.is_main else None):
                passed_over.append(str(error))
            warn(f"checkpoint passed over: {error}")
    if passed_over:
        raise UserError(
            f"{root}: none of its {len(passed_over)} checkpoints can be read; the newest: {passed_over[0]}\n"
            "Bring them back, or take another run.name to start anew."
        )
    return None


def _newest_first(root: str, below: int | None) -> list[int]:
    there = steps(root)
    if below is None:
        return there[::-1]
    return [step for step in reversed(there) if step < below] or there


class Reader:
    """Any range of any tensor of a checkpoint."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        """`manifest` is of the checkpoint at `path`."""
        self.shapes = {name: torch.Size(shape) for name, shape in manifest.shapes.items()}
        self._parts: dict[str, list[tuple[int, int, TensorFile]]] = {name: [] for name in self.shapes}
        for file in manifest.files:
            content = TensorFile(f"{path}/{file.name}")
            for name, (start, stop) in file.ranges.items():
                self._parts[name].append((start, stop, content))

    def __call__(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order: float32, one-dimensional, on the CPU.

        Raises:
            OSError: a file can't be read.
        """
        values = torch.empty(stop - start)
        for first, last, file in self._parts[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                values[low - start : high - start] = file.read(name, low - first, high - first)
        return values

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor, in its shape."""
        shape = self.shapes[name]
        return self(name, 0, shape.numel()).view(shape)


# --------------------------------------------------------------------------------------------- cleaning


def prune(root: str, keep: int, newest: int) -> None:
    """Deletes what is not among the last `keep` checkpoints up to step `newest`, nor the best by held-out loss."""
    losses: dict[int, float | None] = {}
    kept: set[int] = set()
    for step in steps(root):
        path = directory(root, step)
        try:
            losses |= {step: read_manifest(path).eval_loss} if step <= newest else {}
        except CheckpointError as error:
            # What an interrupted attempt left goes. One that can't be read just now, or not by this version, stays.
            if isinstance(error.__cause__, OSError | OtherVersion) and storage.exists(
                f"{path}/manifest.json"
            ):
                kept.add(step)
    kept |= set(sorted(losses)[-keep:])
    if measured := {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}:
        kept.add(min(measured, key=lambda step: (measured[step], -step)))
    for step in set(steps(root)) - kept:
        storage.delete_dir(directory(root, step))
