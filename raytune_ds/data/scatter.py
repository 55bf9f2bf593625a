"""Rows to training sequences, scattered over buckets by a hash of their place: the work of one task.

The hash makes a true global shuffle, and makes it depend on data and seed alone: whichever task works on what, a
sequence lands in the same bucket, and every bucket is later put in the same order. Where a chunk of rows ends depends
on the rows alone too, so a job that is started again finds the same chunks, and leaves out those that are done.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from raytune_ds.data import chunks
from raytune_ds.data.chunks import DOCUMENT_SCHEMA, MARK_SCHEMA
from raytune_ds.data.fit import fit
from raytune_ds.data.formats import Example, RowError, to_example
from raytune_ds.data.inputs import where
from raytune_ds.data.inspection import Inspector, exactly, told
from raytune_ds.data.job import Job, Tally
from raytune_ds.data.readers import Row
from raytune_ds.data.sketch import Marks
from raytune_ds.data.store import doc_id
from raytune_ds.data.template import Encoded, Encoder
from raytune_ds.data.thinking import Thinking
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer

_MIB = 1 << 20
_ROW_CHARS = 64  # what a row takes beside its text
_DONE_AT_ONCE = 64  # chunks of which a task has only to read what became of their rows

_ROW_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "line": pa.int64(),
        "json": pa.large_string(),  # because rows of different files differ in shape
        "error": pa.large_string(),
        "fatal": pa.bool_(),
    }
)
_Rows = list[tuple[Any, ...]]


class Chunk(NamedTuple):
    """Rows of a file as they wait to be encoded: compressed, they take a quarter of the room; none if they are done."""

    file: int
    name: str
    rows: bytes


def read_chunks(
    files: Sequence[int], job: Job, done: frozenset[str], task_chars: int
) -> Iterator[list[Chunk]]:
    """Files to chunks of rows, about `task_chars` of text together for each task that encodes them.

    Chunks that were done when the job began come without rows. What was done since does not count: Ray, which may run
    a task again, relies on it to give the same once more.
    """
    task, size = list[Chunk](), 0
    for file in files:
        for name, rows, chars in _chunks_to_do(job, file, done):
            task.append(Chunk(file, name, _packed(rows)))
            size += chars or task_chars // _DONE_AT_ONCE
            if size >= task_chars:
                yield task
                task, size = [], 0
    if task:
        yield task


def _chunks_to_do(job: Job, file: int, done: frozenset[str]) -> Iterator[tuple[str, _Rows, int]]:
    """The chunks of a file: name, rows and characters of them, none of those that are done."""
    names = chunks.finished_chunks_of_file(job, file, done)
    if names is not None:
        yield from ((name, [], 0) for name in names)
        return
    names = []
    for name, rows, chars in _chunks_of_file(job, file):
        names.append(name)
        yield (name, [], 0) if name in done else (name, rows, chars)
    chunks.note_chunks_of_file(job, file, names)


def _chunks_of_file(job: Job, file: int) -> Iterator[tuple[str, _Rows, int]]:
    rows: _Rows = []
    size = 0
    for row in job.inputs[file].rows():
        text = "" if row.value is None else json.dumps(row.value, default=str)
        rows.append((row.index, row.line or 0, text, row.error or "", row.fatal))
        size += len(text) + len(row.error or "") + _ROW_CHARS
        if size > job.chunk_chars:
            yield chunks.name_of(file, rows[0][0]), rows, size
            rows, size = [], 0
    if rows:
        yield chunks.name_of(file, rows[0][0]), rows, size


def _packed(rows: _Rows) -> bytes:
    if not rows:
        return b""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return chunks.to_bytes(pa.table(columns, schema=_ROW_SCHEMA).to_batches(), _ROW_SCHEMA)


def encode_chunks(task: Sequence[Chunk], job: Job) -> list[tuple[str, Tally]]:
    """Encodes chunks of rows, writes their sequences for the buckets, and tells what became of the rows of each."""
    return [
        (chunk.name, _encode_chunk(chunk, job) if chunk.rows else chunks.read_tally(job, chunk.name))
        for chunk in task
    ]


def _encode_chunk(chunk: Chunk, job: Job) -> Tally:
    work = _Work(job, chunk.file)
    examples: dict[int, Example] = {}
    rows = pa.ipc.open_file(chunk.rows).read_all().to_pydict()
    lines = dict(zip(rows["index"], rows["line"], strict=True))
    for index, line, text, error, fatal in zip(*rows.values(), strict=True):
        work.tally.num_rows += 1
        work.tally.num_bytes += len(text)
        try:
            if error:
                raise RowError(error)
            examples[index] = to_example(json.loads(text), work.input.format)
        except RowError as problem:
            work.reject(Row(index, line or None, None, str(problem), fatal))
    encoded = work.encoder.encode_all(list(examples.values()))
    for (index, example), sequences in zip(examples.items(), encoded, strict=True):
        try:
            if isinstance(sequences, RowError):
                raise sequences
            work.take(index, example, sequences)
        except RowError as problem:
            work.reject(Row(index, lines[index] or None, None, str(problem)))
    work.tally.rejected.sort(key=lambda row: row["row"])
    work.tally.turns.update(work.encoder.turns)
    work.tally.peak_memory_mib = memory_mib()
    chunks.write_chunk(job, chunk.name, work.documents, _marks_of(work.told), work.tally)
    chunks.give_back()
    return work.tally


@lru_cache(maxsize=4)
def _tools(
    spec: TokenizerSpec, last_turn_only: bool, thinking: Thinking, num_chars: int
) -> tuple[Encoder, Inspector]:
    """What a process works with; what they find out of a tokenizer they find out once."""
    encoder = Encoder(load_tokenizer(spec), last_turn_only, thinking, num_chars)
    return encoder, Inspector(encoder)


class _Work:
    """What has come of the rows of a chunk so far."""

    def __init__(self, job: Job, file: int) -> None:
        self.job, self.file, self.input = job, file, job.inputs[file]
        self.encoder, self.inspector = _tools(job.tokenizer, job.last_turn_only, job.thinking, job.text_bytes)
        self.encoder.turns.clear()
        self.tally = Tally()
        self.documents: dict[str, list[Any]] = {name: [] for name in DOCUMENT_SCHEMA.names}
        self.told: list[tuple[int, int, str, str]] = []

    def take(self, index: int, example: Example, sequences: list[Encoded]) -> None:
        """Notes a row.

        Raises:
            RowError: it can't be used.
        """
        fitting = fit(sequences, self.job, self.tally, raw_text=example.text is not None)
        doc = doc_id(self.file, index)
        text = told(example)
        self._look_at(example, sequences, fitting, doc, text)
        if not fitting:
            return
        key, eval_key = _keys(self.job, self.file, index)
        if self.input.held_out:
            eval_key = 0
        else:
            self.tally.note_usable(self.input.source.index, eval_key)
        for piece, sequence in enumerate(fitting):
            ids, weights = np.asarray(sequence.ids, np.int32), np.asarray(sequence.weights, np.float32)
            _append(self.documents, (key, eval_key, piece, doc, ids, weights, sequence.label))
        self.tally.num_docs += len(fitting)
        self.told.append((doc, eval_key, exactly(example), text))

    def reject(self, row: Row) -> None:
        """Notes a bad row."""
        file = self.input.file
        self.tally.num_rejected += 1
        self.tally.reasons[str(row.error)] += 1
        self.tally.rejected.append(
            {
                "file": file.path,
                "row": row.index + 1,
                "line": row.line,
                "reason": row.error,
                "fatal": row.fatal,
                "where": where(file, row),
            }
        )

    def _look_at(
        self, example: Example, sequences: list[Encoded], fitting: list[Encoded], doc: int, text: str
    ) -> None:
        longest = max(len(s.ids) - 1 for s in sequences)
        self.tally.lengths[_length_bin(longest)] += 1
        self.tally.sightings.note_length(longest, doc)
        self.tally.sightings.note(self.inspector.oddities(example, sequences, text), doc)
        if example.text is None and _num_tokens(fitting) < _num_tokens(sequences):
            self.tally.sightings.note(["cut-off" if fitting else "too-long"], doc)


def _marks_of(told_by_row: list[tuple[int, int, str, str]]) -> pa.Table:
    """The marks of rows, given by id, eval key, all of it and what is told: one of all, and one a band of the text."""
    docs, eval_keys, wholes, texts = zip(*told_by_row, strict=True) if told_by_row else ((), (), (), ())
    marks = Marks.of(wholes, texts)
    times = 1 + marks.near.shape[1]
    sketches = [sketch.tobytes() for sketch in marks.sketches]
    return pa.table(
        {
            "mark": np.concatenate([marks.exact[:, None], marks.near], axis=1).ravel(),
            "exact": np.tile([True] + [False] * (times - 1), len(docs)),
            "doc": np.repeat(np.array(docs, np.int64), times),
            "eval_key": np.repeat(np.array(eval_keys, np.uint64), times),
            "sketch": [sketch for sketch in sketches for _ in range(times)],
        },
        schema=MARK_SCHEMA,
    )


def _num_tokens(sequences: list[Encoded]) -> int:
    return sum(len(sequence.ids) for sequence in sequences)


def _append(columns: dict[str, list[Any]], values: tuple[Any, ...]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _keys(job: Job, file: int, index: int) -> tuple[int, int]:
    """Two independent 64-bit hashes of a row's place; the second is never 0, which marks held-out files."""
    place = f"{job.seed}/{file}/{index}".encode()
    return xxhash.xxh3_64_intdigest(place, 0), max(1, xxhash.xxh3_64_intdigest(place, 1))


def _length_bin(length: int) -> str:
    """The upper end of the histogram's bin: powers of two."""
    return str(1 << max(0, length - 1).bit_length())


def memory_mib() -> float:
    """The memory that this process holds for itself, in MiB.

    Asked for where a task holds most. The pages of the object store, which is shared and bounded by itself, do not
    count; the kernel's own peak (ru_maxrss) would count them.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
