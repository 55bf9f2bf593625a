"""Files on any filesystem pyarrow opens: a local path, NFS, s3://, gs://, hdfs://."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

T = TypeVar("T")

PAUSES_S = (0.1, 1.0)
"""Before a write is tried again that failed for a reason that may pass."""
_MAY_PASS = {
    None,  # object stores give no number
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
}
_UPLOADS = 4


def absolute(path: str) -> str:
    """A URI as it is; a local path absolute, with ~ expanded and without file://."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())


def is_local(path: str) -> bool:
    """Whether `path` is reached through this machine's own file tree (which may well be a shared one)."""
    return "://" not in path or path.startswith("file://")


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path within it.

    Raises:
        pyarrow.ArrowInvalid: a scheme pyarrow does not know.
        OSError: the store can't be reached.
    """
    if is_local(path):
        return pafs.LocalFileSystem(), absolute(path)
    filesystem, inner = pafs.FileSystem.from_uri(path)
    return filesystem, inner.rstrip("/")


def exists(path: str) -> bool:
    """Whether there is a file or folder at `path`."""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.get_file_info(inner).type != pafs.FileType.NotFound)


def list_names(path: str) -> list[str]:
    """The names in a folder, sorted; none if it is not there."""
    filesystem, inner = open_filesystem(path)
    selector = pafs.FileSelector(inner, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


def size_of(path: str) -> int:
    """Bytes of all files below a folder."""
    filesystem, inner = open_filesystem(path)
    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    return sum(info.size for info in infos if info.type == pafs.FileType.File)


def make_dir(path: str) -> None:
    """Makes a folder and those above it."""
    filesystem, inner = open_filesystem(path)
    filesystem.create_dir(inner, recursive=True)


def delete_dir(path: str) -> None:
    """Deletes a folder and what is in it; fine if it is not there."""
    filesystem, inner = open_filesystem(path)
    if filesystem.get_file_info(inner).type == pafs.FileType.Directory:
        filesystem.delete_dir(inner)


def delete_file(path: str) -> None:
    """Deletes a file; fine if it is not there."""
    filesystem, inner = open_filesystem(path)
    if filesystem.get_file_info(inner).type == pafs.FileType.File:
        filesystem.delete_file(inner)


def read_bytes(path: str) -> bytes:
    """The whole of a small file."""
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        return bytes(stream.read())


def open_file(path: str) -> Any:
    """A file to read in any order: a pyarrow NativeFile."""
    filesystem, inner = open_filesystem(path)
    return filesystem.open_input_file(inner)


def write_bytes(path: str, content: bytes) -> None:
    """Writes a small file so that it is there whole or not at all.

    S3 and GCS do that by themselves; on a file tree it takes a second name, a flush to disk and a rename. An error that
    may pass is waited for a second or so.
    """
    _persist(lambda: _write_bytes(path, content))


def _persist(action: Callable[[], T]) -> T:
    for pause in PAUSES_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in _MAY_PASS:
                raise
            time.sleep(pause)
    return action()


def _write_bytes(path: str, content: bytes) -> None:
    filesystem, inner = open_filesystem(path)
    filesystem.create_dir(inner.rpartition("/")[0], recursive=True)
    if not is_local(path):
        with filesystem.open_output_stream(inner, compression=None) as stream:
            stream.write(content)
        return
    handle, scratch = tempfile.mkstemp(prefix=".writing-", dir=Path(inner).parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(inner)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Writes a text file of any size so that it is there whole or not at all."""
    folder, _, name = path.rpartition("/")
    make_dir(folder)
    scratch = f"{folder}/.{uuid.uuid4().hex[:8]}-{name}"
    filesystem, inner = open_filesystem(scratch)
    with filesystem.open_output_stream(inner, compression=None) as stream:
        for line in lines:
            stream.write(line.encode())
    if is_local(scratch):
        flush(scratch)
    filesystem.move(inner, open_filesystem(path)[1])


def flush(path: str) -> None:
    """Has the system write a local file to its disk, so that no crash of the machine leaves a part of it."""
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())


def read_json(path: str) -> Any:
    """A JSON file; None if it is not there."""
    return json.loads(read_bytes(path)) if exists(path) else None


def write_json(path: str, value: Any) -> None:
    """`value` as an indented JSON file, whole or not at all; a number that JSON does not have becomes null."""
    write_bytes(
        path, (json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def finite(value: Any) -> Any:
    """`value` with None for every number that JSON does not have (the loss of a skipped step)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def upload_dir(local: Path, path: str) -> None:
    """Copies a local folder to `path`; each file is tried again as `write_bytes` does."""
    files = [file for file in local.rglob("*") if file.is_file()]
    with ThreadPoolExecutor(_UPLOADS) as pool:
        copies = [pool.submit(copy, str(file), f"{path}/{file.relative_to(local)}") for file in files]
    for done in copies:
        done.result()


def copy(source: str, target: str) -> None:
    """Copies a file from anywhere to anywhere."""
    there, inner = open_filesystem(source)
    filesystem, place = open_filesystem(target)

    def attempt() -> None:
        filesystem.create_dir(place.rpartition("/")[0], recursive=True)
        pafs.copy_files(inner, place, there, filesystem)

    _persist(attempt)


def check_writable(path: str) -> None:
    """Writes and deletes a small file under `path`.

    Raises:
        OSError: it can't be written there.
        pyarrow.ArrowInvalid: a scheme pyarrow does not know.
    """
    probe = f"{path}/.writable-{uuid.uuid4().hex}"
    write_bytes(probe, b"")
    filesystem, inner = open_filesystem(probe)
    filesystem.delete_file(inner)
