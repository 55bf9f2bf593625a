"""Takes checkpoints of a run while it goes on.

The state is copied to host memory, and a thread writes the copy while training goes on. One checkpoint is in flight at
most: the next one waits for it. A checkpoint that can't be written (a full disk) costs a warning; the one before stays.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from raytune_ds import catalog, checkpoint, storage
from raytune_ds.catalog import CheckpointError, Manifest, ShardFile
from raytune_ds.checkpoint import Reader
from raytune_ds.config import CheckpointConfig
from raytune_ds.engines import Engine, Piece
from raytune_ds.errors import UserError
from raytune_ds.world import World

Pieces = Callable[[], Iterable[Piece]]
"""The rank's share of the state; asked again where a first attempt to write it failed."""

_REHEARSAL = "rehearsal"


@dataclass(frozen=True)
class Label:
    """What a checkpoint's manifest says besides the tensors; see Manifest."""

    step: int
    progress: dict[str, Any]
    eval_loss: float | None


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete: its directory, its bytes, and the seconds it took to write."""

    label: Label
    path: str
    size: int
    seconds: float


class Saver:
    """Writes the checkpoints of a run. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        root: str,
        config: CheckpointConfig,
        identity: dict[str, Any],
        engine: Engine,
        shapes: dict[str, list[int]],
        world: World,
        done: Callable[[Written], None],
        warn: Callable[[str], None],
        lives: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes a process group of its own, so that its collectives do not mix with those of training.

        Args:
            root: where checkpoints go.
            config: how.
            identity: see Manifest.
            engine: has the state.
            shapes: of all its tensors.
            world: the ranks.
            done: hears of each finished checkpoint, from another thread.
            warn: hears of each that failed.
            lives: called for each file that is written, which shows that storage still takes them.
        """
        self._root, self._config, self._identity = root, config, identity
        self._engine, self._shapes = engine, shapes
        self._world = world.apart()
        self._done, self._warn, self._lives = done, warn, lives
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._clear_rehearsal()  # that a crash may have left

    def save(self, label: Label) -> float:
        """Takes a checkpoint of the state as it is now; returns the seconds that the caller stood still."""
        started = time.perf_counter()
        self.wait()
        if self._config.background:
            copies, updates = self._copies(), self._engine.updates
            self._thread = threading.Thread(
                target=self._guarded, args=(label, lambda: copies, updates), daemon=True
            )
            self._thread.start()
        else:
            self._write(label, self._engine.pieces, self._engine.updates)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until the checkpoint in flight is written or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            raise self._crash

    def close(self) -> None:
        """Waits, and gives the host memory back."""
        self.wait()
        self._host.clear()

    def _clear_rehearsal(self) -> None:
        if self._world.is_main:
            with contextlib.suppress(OSError):
                storage.delete_dir(f"{self._root}/{_REHEARSAL}")

    def _copies(self) -> list[Piece]:
        """The state in host memory that is kept for the next time: fresh pages would cost more than the copy."""
        copies = []
        from_gpu = False
        for piece in self._engine.pieces():
            from_gpu |= piece.tensor.is_cuda
            if piece.name not in self._host:
                self._host[piece.name] = _host_tensor(piece.tensor)
            copy = self._host[piece.name]
            copy.copy_(piece.tensor, non_blocking=True)
            copies.append(Piece(piece.name, piece.start, copy))
        if from_gpu:
            torch.cuda.synchronize()
        return copies

    def _guarded(self, label: Label, pieces: Pieces, updates: int) -> None:
        try:
            self._write(label, pieces, updates)
        except BaseException as error:  # a rank is gone: the training thread has to hear of it
            self._crash = error

    def _write(self, label: Label, pieces: Pieces, updates: int) -> None:
        started = time.perf_counter()
        path = catalog.directory(self._root, label.step)
        try:
            try:
                manifest = self._written(path, label, pieces, updates)
            except CheckpointError:
                if not self._made_room(label.step):
                    raise
                manifest = self._written(path, label, pieces, updates)
        except CheckpointError as error:
            self._warn(
                f"the checkpoint of step {label.step} can't be written ({error}); the run goes on, and earlier "
                "checkpoints stay"
            )
            return
        if self._world.is_main:
            try:
                checkpoint.prune(self._root, self._config.keep, newest=label.step)
            except OSError as error:
                self._warn(f"old checkpoints below {self._root} can't be deleted: {error.strerror or error}")
        self._done(Written(label, path, manifest.size, time.perf_counter() - started))

    def _made_room(self, step: int) -> bool:
        """Deletes all checkpoints but the newest and the best; whether there were others. A collective."""
        freed = False
        if self._world.is_main:
            with contextlib.suppress(OSError):
                before = catalog.steps(self._root)
                checkpoint.prune(self._root, keep=1, newest=step)
                freed = catalog.steps(self._root) != before
        return bool(self._world.broadcast(freed))

    def _written(self, path: str, label: Label, pieces: Pieces, updates: int) -> Manifest:
        """A complete checkpoint at `path`; nothing is left there if it fails.

        Raises:
            CheckpointError: on all ranks alike, if one of them can't write.
        """
        files: list[ShardFile] = []
        manifest: Manifest | None = None

        def clear() -> None:
            storage.delete_dir(path)  # what an interrupted attempt left
            storage.make_dir(path)

        def write_mine() -> None:
            files.extend(checkpoint.write_shards(path, self._world.rank, pieces(), self._lives))

        def finish() -> None:
            assert manifest is not None
            catalog.write_manifest(path, manifest)

        try:
            self._together(clear, main_only=True)
            self._together(write_mine)
            all_files = tuple(file for rank_files in self._world.gather(files) for file in rank_files)
            manifest = Manifest(
                label.step, updates, self._identity, label.progress, label.eval_loss, self._shapes, all_files
            )
            self._together(finish, main_only=True)
        except CheckpointError:
            if self._world.is_main:
                with contextlib.suppress(OSError):
                    storage.delete_dir(path)
            raise
        return manifest

    def _together(self, action: Callable[[], None], main_only: bool = False) -> None:
        """Does something on all ranks, or on rank 0; if it fails on one, it fails on all."""
        mine = action if self._world.is_main or not main_only else lambda: None
        try:
            self._world.together(mine, (OSError,))
        except UserError as error:
            raise CheckpointError(str(error)) from error

    def rehearse(self, label: Label) -> str:
        """Writes a whole checkpoint, verifies it, loads it and deletes it; says what it took. A collective.

        Raises:
            UserError: there is no room for it, or what is read back is not what was written.
        """
        path, before = f"{self._root}/{_REHEARSAL}", _digest(self._engine)
        started = time.perf_counter()
        try:
            pieces = self._copies if self._config.background else self._engine.pieces
            manifest = self._written(path, label, pieces, self._engine.updates)
            written = time.perf_counter()
        except CheckpointError as error:
            raise UserError(
                f"run.storage: a checkpoint of this run can't be written to {self._root}: {error}\nMake room, choose "
                "another run.storage, or set checkpoint.rehearse=false to find out later."
            ) from error
        try:
            checkpoint.verify(path, self._world)
            self._engine.load(Reader(path, manifest), manifest.updates)
            if not all(self._world.gather(_digest(self._engine) == before)):
                raise CheckpointError(f"{path}: what was loaded is not what was written")
        except CheckpointError as error:
            raise UserError(
                f"run.storage: a checkpoint of this run can't be read back from {self._root}: {error}\nEvery node must "
                "see the same files there at once: choose a run.storage that all nodes share (NFS, s3:// ...)."
            ) from error
        finally:
            self._clear_rehearsal()
        self._warn_of_a_small_disk(manifest.size)
        return (
            f"a checkpoint of this run takes {manifest.size / (1 << 20):,.1f} MiB; one was written in "
            f"{written - started:.1f}s and read back in {time.perf_counter() - written:.1f}s"
        )

    def _warn_of_a_small_disk(self, size: int) -> None:
        """Old checkpoints go when a new one is complete: so many lie there for a while, the best among them."""
        most = (self._config.keep + 2) * size
        if self._world.is_main and storage.is_local(self._root):
            free = shutil.disk_usage(storage.absolute(self._root)).free
            if free < most:
                self._warn(
                    f"{self._root}: {free / (1 << 20):,.0f} MiB are free, and {self._config.keep + 2} checkpoints "
                    f"(checkpoint.keep, the best, and one being written) take {most / (1 << 20):,.0f} MiB; older ones "
                    "will be deleted to make room"
                )


def _host_tensor(like: torch.Tensor) -> torch.Tensor:
    """Room for a copy on the CPU; pinned if it comes from a GPU and the system allows it, which makes it quick."""
    if like.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return torch.empty(like.shape, dtype=torch.float32, pin_memory=True)
    return torch.empty(like.shape, dtype=torch.float32)


def _digest(engine: Engine) -> str:
    digest = xxhash.xxh3_128()
    for piece in engine.pieces():
        digest.update(f"{piece.name}{piece.start}".encode())
        digest.update(piece.tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()
