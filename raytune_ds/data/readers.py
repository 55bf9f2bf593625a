"""From a file, or a dataset of the Hugging Face Hub, to rows.

Everything streams: memory is bounded by the longest row (64 MiB at most), never by the size of the file.
"""

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ds import hub
from raytune_ds.data.formats import kind_of
from raytune_ds.data.readers_json import is_json_lines, json_rows
from raytune_ds.data.readers_lines import Found, Unreadable, csv_rows, jsonl_rows, txt_rows
from raytune_ds.data.sources import SourceFile
from raytune_ds.errors import UserError, first_line
from raytune_ds.storage import open_filesystem

_CHUNK = 1 << 20  # bytes a read
_PARQUET_BATCH = 64  # rows; some are whole books
_TEXT_READERS = {"json": json_rows, "jsonl": jsonl_rows, "csv": csv_rows, "txt": txt_rows}


@dataclass(frozen=True)
class Row:
    """One row of a file, or why it can't be had."""

    index: int
    """0-based within its file; rows that can't be read count too."""
    line: int | None
    """1-based line where the row starts, where the container has lines."""
    value: dict[str, Any] | None
    error: str | None
    """Why `value` is None; makes sense behind 'file, row N: '."""
    fatal: bool = False
    """The rest of the file can't be read; this is its last `Row`."""


def read_rows(file: SourceFile) -> Iterator[Row]:
    """The rows of a file in order, those that can't be read included; after a `fatal` one nothing follows.

    Raises:
        UserError: a dataset of the Hub can't be read (on), as that says nothing about its rows.
    """
    for index, (line, value) in enumerate(_found_rows(file)):
        if isinstance(value, Unreadable):
            yield Row(index, line, None, value.error, value.fatal)
            if value.fatal:
                return
        elif isinstance(value, dict):
            yield Row(index, line, value, None)
        else:
            yield Row(index, line, None, f"the row is {kind_of(value)}, expected an object")


def _found_rows(file: SourceFile) -> Iterator[Found]:
    if file.container == "hub":
        yield from _hub_rows(file)
        return
    try:
        yield from _parquet_rows(file) if file.container == "parquet" else _text_rows(file)
    # the last two from Parquet: broken UTF-8, and dates that Python can't hold
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        yield None, Unreadable(f"the file can't be read from here on: {error}", fatal=True)


def _hub_rows(file: SourceFile) -> Iterator[Found]:
    hub.check_dataset(file.path)
    from datasets import load_dataset

    try:
        for row in load_dataset(file.path, file.subset, split=file.split, streaming=True):
            yield None, dict(row)
    except Exception as error:  # errors of its filesystems, HTTP library and readers come through as they are
        raise UserError(
            f"Hugging Face dataset '{file.path}': its split '{file.split}' can't be read: {type(error).__name__}:"
            f" {first_line(error)}. Where it has other splits or several configurations, name them: "
            f"{{path: {file.path}, subset: ..., split: ...}}"
        ) from error


def _parquet_rows(file: SourceFile) -> Iterator[Found]:
    filesystem, inner = open_filesystem(file.path)
    # without pre_buffer a row group's pages come as they are needed, not all at once
    with (
        filesystem.open_input_file(inner) as handle,
        pq.ParquetFile(handle, pre_buffer=False, buffer_size=_CHUNK) as parquet,
    ):
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH):
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                yield None, row


def _text_rows(file: SourceFile) -> Iterator[Found]:
    filesystem, inner = open_filesystem(file.path)
    with (
        filesystem.open_input_stream(inner, compression="detect") as raw,
        io.BufferedReader(raw, _CHUNK) as stream,
        # what is not UTF-8 costs its row, not the file
        io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="\n") as text,
    ):
        head = stream.peek()
        refusal = _refusal(head)
        if refusal:
            yield 1, Unreadable(refusal, fatal=True)
            return
        lines = file.container == "json" and is_json_lines(head.decode("utf-8-sig", "replace"))
        yield from _TEXT_READERS["jsonl" if lines else file.container](text)


def _refusal(head: bytes) -> str | None:
    """Why a file that begins like this is no text of ours."""
    if head.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer, not the data itself: run 'git lfs pull'"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "the file is UTF-16, expected UTF-8: convert it with: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
    return None
