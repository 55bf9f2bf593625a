"""Rows to training sequences, scattered over buckets by a hash of their place: the work of one task.

The hash makes a true global shuffle, and makes it depend on data and seed alone: whichever task works on what, a
sequence lands in the same bucket, and every bucket is later put in the same order.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from raytune_ds.data.formats import RowError, to_example
from raytune_ds.data.inputs import Input, where
from raytune_ds.data.readers import Row, read_rows
from raytune_ds.data.store import doc_id, write_table
from raytune_ds.data.template import Encoded, Encoder
from raytune_ds.data.thinking import Thinking
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer

BLOCK_CHARS = 1 << 20
_MIB = 1 << 20

DOCUMENT_SCHEMA = pa.schema(
    {
        "key": pa.uint64(),  # decides bucket and place in it
        "eval_key": pa.uint64(),  # the lowest ones are held out
        "piece": pa.int32(),  # which sequence of its row
        "doc": pa.int64(),
        "ids": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
    }
)


@dataclass(frozen=True)
class Job:
    """All that a task of the job needs to know."""

    inputs: tuple[Input, ...]
    text_bytes: int
    tokenizer: TokenizerSpec
    seq_len: int
    on_long_row: str
    last_turn_only: bool
    thinking: Thinking
    seed: int
    eval_fraction: float
    num_buckets: int
    scratch: str
    target: str


@dataclass
class Tally:
    """What became of the rows of one block, or of all of them."""

    num_rows: int = 0
    num_bytes: int = 0
    num_truncated: int = 0
    num_dropped_long: int = 0
    num_split: int = 0
    num_docs: int = 0
    lowest_eval_key: int = (1 << 64) - 1
    lengths: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    peak_memory_mib: float = 0.0

    def add(self, other: Tally) -> None:
        """Takes in another block's tally, but not its rejected rows, which go to a file."""
        self.num_rows += other.num_rows
        self.num_bytes += other.num_bytes
        self.num_truncated += other.num_truncated
        self.num_dropped_long += other.num_dropped_long
        self.num_split += other.num_split
        self.num_docs += other.num_docs
        self.lowest_eval_key = min(self.lowest_eval_key, other.lowest_eval_key)
        self.lengths.update(other.lengths)
        self.turns.update(other.turns)
        self.peak_memory_mib = max(self.peak_memory_mib, other.peak_memory_mib)


def read_blocks(batch: dict[str, np.ndarray], job: Job) -> Iterator[dict[str, Any]]:
    """One file to blocks of rows, each row as JSON text, because rows of different files differ in shape."""
    for number in batch["input"]:
        block: list[tuple[int, int, int, str, str, bool]] = []
        size = 0
        for row in read_rows(job.inputs[number].file):
            text = "" if row.value is None else json.dumps(row.value, default=str)
            block.append((int(number), row.index, row.line or 0, text, row.error or "", row.fatal))
            size += len(text)
            if size > BLOCK_CHARS:
                yield _row_columns(block)
                block, size = [], 0
        if block:
            yield _row_columns(block)


def _row_columns(block: list[tuple[int, int, int, str, str, bool]]) -> dict[str, Any]:
    file, index, line, text, error, fatal = zip(*block, strict=True)
    return {
        "file": np.array(file),
        "index": np.array(index),
        "line": np.array(line),
        "json": pa.array(text, pa.large_string()),
        "error": pa.array(error, pa.large_string()),
        "fatal": np.array(fatal),
    }


def encode_block(block: pa.Table, job: Job) -> dict[str, list[Tally]]:
    """Encodes one block of rows, writes its sequences to the buckets, and tells what became of them."""
    encoder = Encoder(load_tokenizer(job.tokenizer), job.last_turn_only, job.thinking)
    tally = Tally()
    documents: dict[str, list[Any]] = {name: [] for name in DOCUMENT_SCHEMA.names}
    columns = (block.column(name) for name in ("file", "index", "line", "json", "error", "fatal"))
    for values in zip(*columns, strict=True):
        file, index, line, text, error, fatal = (value.as_py() for value in values)
        tally.num_rows += 1
        tally.num_bytes += len(text)
        source = job.inputs[file]
        try:
            if error:
                raise RowError(error)
            example = to_example(json.loads(text), source.format)
            sequences = _fit(encoder.encode(example), job, tally, raw_text=example.text is not None)
        except RowError as problem:
            row = Row(index, line or None, None, str(problem), fatal)
            tally.rejected.append(
                {
                    "file": source.file.path,
                    "row": index + 1,
                    "line": line or None,
                    "reason": str(problem),
                    "fatal": fatal,
                    "where": where(source.file, row),
                }
            )
            continue
        key, eval_key = _keys(job, file, index)
        if not source.held_out and sequences:
            tally.lowest_eval_key = min(tally.lowest_eval_key, eval_key)
        for piece, sequence in enumerate(sequences):
            record = (
                key,
                0 if source.held_out else eval_key,
                piece,
                doc_id(file, index),
                np.asarray(sequence.ids, np.int32),
                np.asarray(sequence.weights, np.float32),
            )
            for name, value in zip(DOCUMENT_SCHEMA.names, record, strict=True):
                documents[name].append(value)
    tally.num_docs = len(documents["key"])
    tally.turns = encoder.turns
    if documents["key"]:
        first = f"{block.column('file')[0].as_py():06d}-{block.column('index')[0].as_py():012d}"
        _write_buckets(pa.table(documents, schema=DOCUMENT_SCHEMA), job, first)
    tally.peak_memory_mib = memory_mib()
    return {"tally": [tally]}


def _fit(sequences: list[Encoded], job: Job, tally: Tally, raw_text: bool) -> list[Encoded]:
    """Sequences that fit a pack: raw text is split, anything else cut or dropped as configured.

    Raises:
        RowError: nothing is supervised.
    """
    longest = job.seq_len + 1  # the last token is only ever a target
    fitting: list[Encoded] = []
    dropped = 0
    for sequence in sequences:
        tally.lengths[_length_bin(len(sequence.ids) - 1)] += 1
        if len(sequence.ids) > longest and raw_text:
            starts = range(0, len(sequence.ids) - 1, job.seq_len)
            pieces = [
                Encoded(sequence.ids[start : start + longest], sequence.weights[start : start + longest])
                for start in starts
            ]
            fitting += [piece for piece in pieces if piece.num_supervised]
            tally.num_split += 1
        elif len(sequence.ids) > longest:
            cut = Encoded(sequence.ids[:longest], sequence.weights[:longest])
            if job.on_long_row == "truncate" and cut.num_supervised:
                tally.num_truncated += 1
                fitting.append(cut)
            else:
                dropped += 1
        elif sequence.num_supervised:
            fitting.append(sequence)
    tally.num_dropped_long += dropped
    if not fitting and not dropped:
        raise RowError("nothing in it is trained on: no supervised token is left after rendering")
    return fitting


def _keys(job: Job, file: int, index: int) -> tuple[int, int]:
    """Two independent 64-bit hashes of a row's place; the second is never 0, which marks held-out files."""
    place = f"{job.seed}/{file}/{index}".encode()
    return xxhash.xxh3_64_intdigest(place, 0), max(1, xxhash.xxh3_64_intdigest(place, 1))


def _write_buckets(documents: pa.Table, job: Job, name: str) -> None:
    """The block's share of each bucket as one file; the name makes a task that is run again replace its own."""
    buckets = documents.column("key").to_numpy() % np.uint64(job.num_buckets)
    for bucket in np.unique(buckets).tolist():
        part = documents.filter(pa.array(buckets == bucket))
        write_table(part, f"{bucket_dir(job, bucket)}/{name}.parquet")


def bucket_dir(job: Job, bucket: int) -> str:
    """Where the parts of a bucket gather."""
    return f"{job.scratch}/bucket-{bucket:06d}"


def _length_bin(length: int) -> str:
    """The upper end of the histogram's bin: powers of two."""
    return str(1 << max(0, length - 1).bit_length())


def memory_mib() -> float:
    """The memory that this process holds for itself, in MiB.

    At the end of a task that is its peak, because allocators give little back. The pages of the object store, which
    is shared and bounded by itself, do not count; the kernel's own peak (ru_maxrss) would count them.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
