"""What a checkpoint says of itself: JSON, which needs no torch to be read.

    checkpoints/step-00000120/manifest.json

No manifest, no checkpoint: it is written last.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from raytune_ds import storage

VERSION = 2
_NAME = re.compile(r"step-(\d{8})\Z")


class CheckpointError(Exception):
    """A checkpoint is incomplete or damaged; the message says which file and how."""


class OtherVersion(ValueError):
    """A manifest that another version of this package wrote."""


@dataclass(frozen=True)
class ShardFile:
    """One file of a checkpoint: size in bytes, xxh3-128 checksum, and the range [start, stop) of each tensor in it."""

    name: str
    size: int
    checksum: str
    ranges: dict[str, list[int]]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        step: optimizer steps done.
        updates: those of them that were applied.
        identity: what the run must agree on to go on.
        progress: what the run has counted so far.
        eval_loss: the held-out loss at this very step; None where none was measured.
        shapes: of all tensors.
        files: where their elements are.
    """

    step: int
    updates: int
    identity: dict[str, Any]
    progress: dict[str, Any]
    eval_loss: float | None
    shapes: dict[str, list[int]]
    files: tuple[ShardFile, ...]
    version: int = VERSION

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """As it lies in manifest.json, with a checksum of its own."""
        values = storage.finite(asdict(self))
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
            raise OtherVersion(f"is of version {values['version']}, and this package reads {VERSION}")
        return Manifest(files=tuple(ShardFile(**file) for file in values.pop("files")), **values)

    def require_whole(self) -> None:
        """Whether the files' ranges make up every tensor.

        Raises:
            ValueError: a range is missing, or there twice.
        """
        ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in self.shapes}
        for file in self.files:
            for name, (start, stop) in file.ranges.items():
                if name not in ranges:
                    raise ValueError(f"{name}: is in {file.name}, but should not be")
                ranges[name].append((start, stop))
        for name, parts in ranges.items():
            end = 0
            for start, stop in sorted(parts):
                if start != end:
                    raise ValueError(
                        f"{name}: elements {min(start, end)} to {max(start, end)} are missing or there twice"
                    )
                end = stop
            if end != math.prod(self.shapes[name]):
                raise ValueError(f"{name}: its end is missing")


def _checksum_of(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def directory(root: str, step: int) -> str:
    """The checkpoint of `step` below `root`."""
    return f"{root}/step-{step:08d}"


def steps(root: str) -> list[int]:
    """The steps of all checkpoint directories below `root`, complete or not, oldest first."""
    return sorted(int(match.group(1)) for name in storage.list_names(root) if (match := _NAME.match(name)))


def write_manifest(path: str, manifest: Manifest) -> None:
    """Makes what lies at `path` a checkpoint.

    Raises:
        OSError: it can't be written.
        ValueError: its files do not make up every tensor.
    """
    manifest.require_whole()
    storage.write_json(f"{path}/manifest.json", manifest.to_json())


def read_manifest(path: str) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is not there or makes no sense.
    """
    try:
        manifest = Manifest.from_json(json.loads(storage.read_bytes(f"{path}/manifest.json")))
        manifest.require_whole()
        return manifest
    except OSError as error:
        why = "no manifest, so it was never finished"
        if not isinstance(error, FileNotFoundError):
            why = f"its manifest can't be read: {error}"
        raise CheckpointError(f"{path}: {why}") from error
    except OtherVersion as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}/manifest.json: damaged: {error}") from error


def newest_complete(root: str) -> Manifest | None:
    """The manifest of the newest complete checkpoint below `root`, its files unseen; None if there is none."""
    for step in reversed(steps(root)):
        with contextlib.suppress(CheckpointError):
            return read_manifest(directory(root, step))
    return None
