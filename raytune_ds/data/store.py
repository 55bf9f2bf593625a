"""The packed store: what training reads, made once and found again by its fingerprint.

    <storage>/.prepared/<fingerprint>/
        manifest.json             written last: no manifest, no store
        train-00000.parquet ...   packs; all row groups hold ROW_GROUP packs but the very last
        eval-00000.parquet ...
        rejected.jsonl            skipped rows, each with its reason

A pack is one Parquet row: `ids`, `targets` (int32), `weights` (float32; 0 where not trained on), `lengths` (tokens of
each document), `docs` (which row of which file each document came from) and `labels` (a `Label` a document; a chosen
answer is followed by the rejected one of its row, in the same pack).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ds import storage
from raytune_ds.data.findings import Finding
from raytune_ds.data.order import Order, Place
from raytune_ds.storage import open_filesystem

VERSION = 3
ROW_GROUP = 32
SPLITS = ("train", "eval")

PACK_SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "targets": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
        "lengths": pa.list_(pa.int32()),
        "docs": pa.list_(pa.int64()),
        "labels": pa.list_(pa.int8()),
    }
)
FILE_SHIFT = 40


def doc_id(file: int, row: int) -> int:
    """The file's place in the manifest and the row's in the file (below 2**40), as one int64."""
    return (file << FILE_SHIFT) | row


def file_and_row(doc: int) -> tuple[int, int]:
    """The way back from `doc_id`."""
    return doc >> FILE_SHIFT, doc & ((1 << FILE_SHIFT) - 1)


@dataclass(frozen=True)
class Part:
    """What one source has in a split."""

    num_docs: int
    num_tokens: int
    num_supervised: int


@dataclass(frozen=True)
class Split:
    """One split's shards and what is in them.

    Attributes:
        shards: file name and number of packs of each.
        num_packs: packs in all shards.
        num_docs: documents, the pieces of a long raw text and the answers of a pair counted apart.
        num_tokens: positions the model runs on.
        num_supervised: targets with a weight that is not zero.
        sources: the same of each source that has something in it, by name.
    """

    shards: tuple[tuple[str, int], ...] = ()
    num_packs: int = 0
    num_docs: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    sources: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from.

    Attributes:
        files, formats: read, and the format of each.
        sources: names of the sources.
        file_sources: for each file the index of its source.
        findings: what is wrong or odd.
        num_rows ... num_split: see job.Tally.
        length_histogram: rows by the upper end of their bin of tokens.
    """

    fingerprint: str
    seq_len: int
    train: Split
    eval: Split
    files: tuple[str, ...]
    formats: dict[str, str]
    tokenizer: str
    num_rows: int
    num_rejected: int
    rejected_reasons: dict[str, int]
    num_truncated: int
    num_dropped_long: int
    length_histogram: dict[str, int]
    num_split: int = 0
    sources: tuple[str, ...] = ()
    file_sources: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()
    reasoning: dict[str, int] = field(default_factory=dict)
    row_group: int = ROW_GROUP
    version: int = VERSION

    def moved(self, sources: tuple[str, ...], **places: Any) -> Manifest:
        """The same of files that lie elsewhere now, and of sources that have other names for it."""
        names = dict(zip(self.sources, sources, strict=True))

        def renamed(split: Split) -> Split:
            return replace(split, sources={names[source]: part for source, part in split.sources.items()})

        return replace(self, sources=sources, train=renamed(self.train), eval=renamed(self.eval), **places)

    def to_json(self) -> str:
        """As it lies in manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The way back from `to_json`."""
        values = json.loads(text)
        for name in SPLITS:
            split = values[name]
            split["shards"] = tuple((shard, packs) for shard, packs in split["shards"])
            split["sources"] = {source: Part(**part) for source, part in split["sources"].items()}
            values[name] = Split(**split)
        for name in ("files", "sources", "file_sources"):
            values[name] = tuple(values[name])
        values["findings"] = tuple(map(Finding.of_json, values["findings"]))
        return Manifest(**values)


@dataclass(frozen=True)
class Store:
    """A finished store; cheap to send to a worker."""

    path: str
    manifest: Manifest

    @staticmethod
    def find(path: str) -> Store | None:
        """The store at `path`, or None if it was never finished."""
        manifest = f"{path}/manifest.json"
        return (
            Store(path, Manifest.from_json(storage.read_bytes(manifest).decode()))
            if storage.exists(manifest)
            else None
        )

    def split(self, name: str) -> Split:
        """`train` or `eval`."""
        return self.manifest.train if name == "train" else self.manifest.eval

    def order(self, split: str, global_batch: int, seed: int | None) -> Order:
        """The order in which a run reads `split`."""
        return Order(self.split(split).num_packs, self.manifest.row_group, global_batch, seed)

    def reader(self, split: str) -> PackReader:
        """Reads packs of `split`."""
        return PackReader(self.path, self.split(split), self.manifest.row_group)


class PackReader:
    """Packs by their place, a few row groups kept at hand."""

    CACHED_ROW_GROUPS = 8

    def __init__(self, path: str, split: Split, row_group: int) -> None:
        """Opens nothing yet: shards are opened when first read."""
        self._path, self._split, self._row_group = path, split, row_group
        self._read = lru_cache(self.CACHED_ROW_GROUPS)(self._read_row_group)

    def pack(self, place: Place) -> dict[str, np.ndarray]:
        """The pack at `place`: ids, targets, weights, lengths, docs, labels."""
        return {
            name: values[offsets[place.row] : offsets[place.row + 1]]
            for name, (values, offsets) in self._read(place.row_group).items()
        }

    def docs(self, row_group: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that all packs of a row group came from, and where those of each pack begin, and nothing else."""
        return self._columns(row_group, ["docs"])["docs"]

    def step(self, order: Order, step: int, slots: range) -> list[dict[str, np.ndarray]]:
        """The packs that `slots` read at a global step."""
        places = (order.place(step, slot) for slot in slots)
        return [self.pack(place) for place in places if place is not None]

    def _read_row_group(self, row_group: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return self._columns(row_group, PACK_SCHEMA.names)

    def _columns(self, row_group: int, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        shard = int(np.searchsorted(self._first_groups, row_group, side="right")) - 1
        table = self._file(shard).read_row_group(row_group - int(self._first_groups[shard]), columns=names)
        columns = {}
        for name in names:
            column = table.column(name).combine_chunks()
            columns[name] = (column.values.to_numpy(), column.offsets.to_numpy())
        return columns

    @cached_property
    def _first_groups(self) -> np.ndarray:
        """The number of the first row group of each shard."""
        groups = [-(-packs // self._row_group) for _, packs in self._split.shards]
        return np.concatenate([[0], np.cumsum(groups)[:-1]])

    def _file(self, shard: int) -> pq.ParquetFile:
        return _open_parquet(f"{self._path}/{self._split.shards[shard][0]}")


@lru_cache(maxsize=32)
def _open_parquet(path: str) -> pq.ParquetFile:
    filesystem, inner = open_filesystem(path)
    return pq.ParquetFile(filesystem.open_input_file(inner))


def pack_documents(packs: Iterable[Sequence[int]], documents: pa.Table) -> pa.Table:
    """Documents to packs, the targets shifted by one, here and nowhere else.

    Args:
        packs: for each pack the rows of `documents` it takes.
        documents: columns ids (list of int32), weights (list of float32, one a token: its weight as a target), doc,
            label. A document of n tokens fills n - 1 positions, since its last token is only ever a target.
    """
    ids, weights = in_one(documents.column("ids")), in_one(documents.column("weights"))
    tokens, token_weights, offsets = ids.values.to_numpy(), weights.values.to_numpy(), ids.offsets.to_numpy()
    doc_ids, labels = documents.column("doc").to_numpy(), documents.column("label").to_numpy()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in PACK_SCHEMA.names}
    for members in packs:
        spans = [(offsets[m], offsets[m + 1]) for m in members]
        columns["ids"].append(np.concatenate([tokens[a : b - 1] for a, b in spans]))
        columns["targets"].append(np.concatenate([tokens[a + 1 : b] for a, b in spans]))
        columns["weights"].append(np.concatenate([token_weights[a + 1 : b] for a, b in spans]))
        columns["lengths"].append(np.array([b - a - 1 for a, b in spans], np.int32))
        columns["docs"].append(doc_ids[list(members)])
        columns["labels"].append(labels[list(members)])
    return pa.table(columns, schema=PACK_SCHEMA)


def in_one(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; copied only where it is in several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def write_tables(tables: Iterable[pa.Table], path: str, schema: pa.Schema) -> None:
    """Tables of any length, one after the other, as one Parquet file whose row groups are all whole but the last."""
    filesystem, inner = open_filesystem(path)
    folder, _, name = inner.rpartition("/")
    filesystem.create_dir(folder, recursive=True)
    # Under another name first: a second job that prepares the same data must not truncate what a first one reads.
    scratch = f"{folder}/.{uuid.uuid4().hex[:8]}-{name}"
    waiting = schema.empty_table()
    with (
        filesystem.open_output_stream(scratch, compression=None) as stream,
        pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            whole = waiting.num_rows // ROW_GROUP * ROW_GROUP
            if whole:  # or there would be an empty row group
                writer.write_table(waiting.slice(0, whole), row_group_size=ROW_GROUP)
            waiting = waiting.slice(whole)
        if waiting.num_rows:
            writer.write_table(waiting, row_group_size=ROW_GROUP)
    if storage.is_local(path):
        storage.flush(scratch)
    filesystem.move(scratch, inner)


def read_table(path: str) -> pa.Table:
    """The whole of a Parquet file."""
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_file(inner) as file:
        return pq.read_table(file)
