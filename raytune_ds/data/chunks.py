"""What a task has made of a chunk of rows, on its way to the buckets: two Arrow files, of one batch a bucket each.

    <scratch>/chunks/<file>-<row>.arrow   the chunk's sequences by bucket, and its tally; written last
    <scratch>/marks/<file>-<row>.arrow    marks of its rows by which doubles are found, by bucket
    <scratch>/read/<file>.json            the chunks of a file that was read to its end

A chunk whose file is there is done: a job that is started again leaves it out. So does one for a file that was read to
its end and all whose chunks are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ds import storage
from raytune_ds.data.job import Job, Tally
from raytune_ds.data.sketch import MINIMA

DOCUMENT_SCHEMA = pa.schema(
    {
        "key": pa.uint64(),  # decides bucket and place in it
        "eval_key": pa.uint64(),  # the lowest ones are held out
        "piece": pa.int32(),  # which sequence of its row
        "doc": pa.int64(),
        "ids": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
        "label": pa.int8(),
    }
)
MARK_SCHEMA = pa.schema(
    {
        "mark": pa.uint64(),  # rows with the same one are alike
        "exact": pa.bool_(),  # or even the same
        "doc": pa.int64(),
        "eval_key": pa.uint64(),
        "sketch": pa.binary(MINIMA),  # how much alike; see sketch
    }
)
_TALLY = b"tally"
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


def name_of(file: int, row: int) -> str:
    """The name of the chunk that begins with a row."""
    return f"{file:06d}-{row:012d}"


def finished(job: Job) -> frozenset[str]:
    """The names of the chunks that are done."""
    return frozenset(_stem(name) for name in storage.list_names(f"{job.scratch}/chunks") if name[0] != ".")


def finished_chunks_of_file(job: Job, file: int, done: frozenset[str]) -> list[str] | None:
    """The names of a file's chunks if they are all done, else None: then it has to be read (again)."""
    names = storage.read_json(f"{job.scratch}/read/{file:06d}.json")
    return names if names is not None and done.issuperset(names) else None


def expected(job: Job) -> list[str]:
    """The names of the chunks of all files."""
    files = [storage.read_json(f"{job.scratch}/read/{file:06d}.json") for file in range(len(job.inputs))]
    return [name for names in files for name in names or ()]


def note_chunks_of_file(job: Job, file: int, names: Sequence[str]) -> None:
    """Says that a file was read to its end."""
    storage.write_json(f"{job.scratch}/read/{file:06d}.json", names)


def write_chunk(
    job: Job, name: str, documents: Mapping[str, Sequence[object]], marks: pa.Table, tally: Tally
) -> None:
    """Writes what a chunk came to; a task that runs again replaces its own."""
    table = pa.table(documents, schema=DOCUMENT_SCHEMA.with_metadata({_TALLY: tally.to_json().encode()}))
    _write_batches(f"{job.scratch}/marks/{name}.arrow", marks, marks.column("mark"), job.num_buckets)
    _write_batches(f"{job.scratch}/chunks/{name}.arrow", table, table.column("key"), job.num_buckets)


def read_tally(job: Job, name: str) -> Tally:
    """The tally of a chunk that is done."""
    with pa.ipc.open_file(storage.open_file(f"{job.scratch}/chunks/{name}.arrow")) as reader:
        return Tally.from_json(reader.schema.metadata[_TALLY].decode())


def bucket_documents(job: Job, bucket: int, columns: Sequence[str] | None = None) -> pa.Table:
    """A bucket's sequences, chunk by chunk; `final_order` is that in which they are packed."""
    return _gathered(job, "chunks", bucket, DOCUMENT_SCHEMA, columns)


def final_order(documents: pa.Table) -> np.ndarray:
    """The sequences of a bucket as their keys have it, whatever chunks they came from."""
    return _order(documents, "key", "doc", "piece")


def bucket_marks(job: Job, bucket: int) -> tuple[pa.Table, np.ndarray]:
    """A bucket's marks, and their order in which alike ones are together."""
    marks = _gathered(job, "marks", bucket, MARK_SCHEMA, None)
    return marks, _order(marks, "exact", "mark", "doc")


def _order(table: pa.Table, *columns: str) -> np.ndarray:
    found: np.ndarray = pc.sort_indices(table, [(name, "ascending") for name in columns]).to_numpy()
    return found


def to_bytes(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> bytes:
    """Batches as one compressed Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=_COMPRESSED) as writer:
        for batch in batches:
            writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def give_back() -> None:
    """At the end of a task: what Arrow would keep for the next one like it; the next one is often another."""
    pa.default_memory_pool().release_unused()


def _gathered(
    job: Job, folder: str, bucket: int, schema: pa.Schema, columns: Sequence[str] | None
) -> pa.Table:
    wanted = pa.schema([field for field in schema if columns is None or field.name in columns])
    parts: list[list[pa.Array]] = [[] for _ in wanted]
    for batch in _batches(f"{job.scratch}/{folder}", bucket, wanted.names):
        for column, part in zip(parts, batch.columns, strict=True):
            column.append(part)
    # Column by column, so that only one is there twice.
    return pa.table([_joined(parts.pop(0), field.type) for field in wanted], schema=wanted)


def _joined(parts: list[pa.Array], kind: pa.DataType) -> pa.Array:
    return pa.concat_arrays(parts) if parts else pa.array([], kind)


def _batches(folder: str, bucket: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for name in storage.list_names(folder):
        if name[0] == ".":  # being written
            continue
        with pa.ipc.open_file(storage.open_file(f"{folder}/{name}")) as reader:
            batch = reader.get_batch(bucket).select(columns)
            yield batch.replace_schema_metadata(None)


def _write_batches(path: str, table: pa.Table, keys: pa.ChunkedArray, num_buckets: int) -> None:
    """The rows of each bucket as a batch of their own."""
    buckets = keys.to_numpy() % np.uint64(num_buckets)
    order = np.argsort(buckets, kind="stable")
    ends = np.searchsorted(buckets[order], np.arange(num_buckets), side="right")
    ordered = table.take(pa.array(order)).combine_chunks()
    batches = (
        batch
        for start, end in zip([0, *ends], ends, strict=False)
        for batch in ordered.slice(start, end - start).to_batches() or [_empty(table.schema)]
    )
    storage.write_bytes(path, to_bytes(batches, table.schema))


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _stem(name: str) -> str:
    return name.removesuffix(".arrow")
