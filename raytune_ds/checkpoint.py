"""Checkpoints: safetensors and JSON, written by the ranks side by side, complete once their manifest is there.

    checkpoints/step-00000120/
        rank-00000-00000.safetensors ...   tensors by name, in shards of bounded size
        manifest.json                      size and checksum of every file; written last

No manifest, no checkpoint. Nothing in it depends on the engine or the number of ranks that wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from raytune_ds import storage
from raytune_ds.world import World

VERSION = 1
SHARD_BYTES = 512 << 20
_NAME = re.compile(r"step-(\d{8})\Z")


class CheckpointError(Exception):
    """A checkpoint is incomplete or damaged; the message says which file and how."""


@dataclass(frozen=True)
class ShardFile:
    """One file of a checkpoint: its size in bytes, its xxh3-128 checksum, and the shapes of its tensors."""

    name: str
    size: int
    checksum: str
    tensors: dict[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: the optimizer steps done, what the run must agree on to go on, and the files."""

    step: int
    identity: dict[str, Any]
    progress: dict[str, Any]
    files: tuple[ShardFile, ...]
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """As it lies in manifest.json, with a checksum of its own."""
        values = asdict(self)
        return {**values, "checksum": _checksum_of(values)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Manifest:
        """The way back from `to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is damaged.
        """
        checksum = values.pop("checksum")
        if checksum != _checksum_of(values):
            raise ValueError("its content has changed (checksum differs)")
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']} is not {VERSION}, the one this package reads")
        return Manifest(files=tuple(ShardFile(**file) for file in values.pop("files")), **values)


def _checksum_of(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def directory(root: str, step: int) -> str:
    """The checkpoint of `step` below `root`."""
    return f"{root}/step-{step:08d}"


def steps(root: str) -> list[int]:
    """The steps of all checkpoint directories below `root`, complete or not, oldest first."""
    return sorted(int(match.group(1)) for name in storage.list_names(root) if (match := _NAME.match(name)))


def save(
    root: str,
    step: int,
    state: Mapping[str, torch.Tensor],
    identity: dict[str, Any],
    progress: dict[str, Any],
    world: World,
) -> str:
    """Writes a checkpoint; all ranks call it, each with its share of the state.

    Args:
        root: the run's checkpoint folder.
        step: optimizer steps done.
        state: this rank's tensors by name.
        identity: what has to be the same for a run to go on from here.
        progress: what the run has counted so far (tokens, best loss ...).
        world: the ranks.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: it can't be written; what was there before is untouched.
    """
    path = directory(root, step)
    if world.is_main:
        storage.delete_dir(path)  # what an interrupted attempt left
        storage.make_dir(path)
    world.barrier()
    written = [_write_shard(path, world.rank, i, shard) for i, shard in enumerate(_shards(state))]
    files = tuple(file for rank_files in world.gather(written) for file in rank_files)
    if world.is_main:
        storage.write_json(f"{path}/manifest.json", Manifest(step, identity, progress, files).to_json())
    world.barrier()
    return path


def _shards(state: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in state.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _write_shard(path: str, rank: int, number: int, tensors: dict[str, torch.Tensor]) -> ShardFile:
    name = f"rank-{rank:05d}-{number:05d}.safetensors"
    content = safetensors.torch.save(tensors)
    storage.write_bytes(f"{path}/{name}", content)
    shapes = {tensor_name: list(tensor.shape) for tensor_name, tensor in tensors.items()}
    return ShardFile(name, len(content), xxhash.xxh3_128_hexdigest(content), shapes)


def read_manifest(path: str) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is not there or makes no sense.
    """
    try:
        return Manifest.from_json(json.loads(storage.read_bytes(f"{path}/manifest.json")))
    except OSError as error:
        raise CheckpointError(f"{path}: no manifest, so it was never finished") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}/manifest.json: damaged: {error}") from error


def verify(path: str) -> Manifest:
    """Reads all of a checkpoint and compares it with its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    manifest = read_manifest(path)
    for file in manifest.files:
        _read_verified(path, file)
    return manifest


def _read_verified(path: str, file: ShardFile) -> bytes:
    try:
        content = storage.read_bytes(f"{path}/{file.name}")
    except OSError as error:
        raise CheckpointError(f"{path}/{file.name}: can't be read: {error}") from error
    if len(content) != file.size:
        raise CheckpointError(f"{path}/{file.name}: {len(content)} bytes, should be {file.size}")
    if xxhash.xxh3_128_hexdigest(content) != file.checksum:
        raise CheckpointError(f"{path}/{file.name}: its content has changed (checksum differs)")
    return content


def newest(root: str, warn: Callable[[str], None]) -> tuple[str, Manifest] | None:
    """The newest checkpoint that verifies; `warn` hears of those that do not."""
    for step in reversed(steps(root)):
        path = directory(root, step)
        try:
            manifest = verify(path)
            if manifest.step != step:
                raise CheckpointError(f"{path}: holds step {manifest.step}")
            return path, manifest
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    return None


class Reader:
    """A checkpoint's tensors by name, one shard in memory at a time."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        """`manifest` is of the checkpoint at `path`."""
        self._path = path
        self._file_of = {name: file for file in manifest.files for name in file.tensors}
        self.names = {
            name: torch.Size(shape) for file in manifest.files for name, shape in file.tensors.items()
        }
        self._loaded: tuple[str, dict[str, torch.Tensor]] | None = None

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU.

        Raises:
            CheckpointError: its file is damaged.
        """
        file = self._file_of[name]
        if self._loaded is None or self._loaded[0] != file.name:
            try:
                tensors = safetensors.torch.load(_read_verified(self._path, file))
            except SafetensorError as error:
                raise CheckpointError(f"{self._path}/{file.name}: {error}") from error
            self._loaded = (file.name, tensors)
        return self._loaded[1][name]


def prune(root: str, keep: int, newest: int) -> None:
    """Deletes all but the last `keep` checkpoints up to step `newest`, and what interrupted attempts left."""
    finished = [
        step
        for step in steps(root)
        if step <= newest and storage.exists(f"{directory(root, step)}/manifest.json")
    ]
    for step in set(steps(root)) - set(finished[-keep:]):
        storage.delete_dir(directory(root, step))
