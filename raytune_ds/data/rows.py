"""The rows that a global batch was made of: slot, file, row and line of each document, and how it begins."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raytune_ds.data import batchid
from raytune_ds.data.formats import RowError, to_example
from raytune_ds.data.inputs import where
from raytune_ds.data.order import Order
from raytune_ds.data.readers import Row, read_rows
from raytune_ds.data.sources import SourceFile, expand
from raytune_ds.data.store import Store, doc_id, file_and_row
from raytune_ds.errors import UserError

NAMED_DOCUMENTS = 3
QUICKLY_READ = 32 << 20
"""Bytes of a file that training may wait for, to name the line of a row."""


@dataclass(frozen=True)
class Document:
    """One document of a batch.

    Attributes:
        slot: that read it.
        doc: the id of its row, see store.doc_id.
        ids: its tokens; the last one is only ever a target.
    """

    slot: int
    doc: int
    ids: np.ndarray


@dataclass(frozen=True)
class Origin:
    """A row of a source file.

    Attributes:
        file: its path, or the name of a data set of the hub.
        row: 0-based.
        line: where it starts, from 1; None where the file has no lines, or is not there.
        text: its text, or the first question; None where the file is not there, or has no such row.
    """

    file: str
    row: int
    line: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        """Its place in words."""
        return where(SourceFile(self.file, "", 0), Row(self.row, self.line, None, None))


@dataclass(frozen=True)
class StepRows:
    """All documents of a step's batch, by slot, and the batch's fingerprint."""

    documents: tuple[Document, ...]
    batch: str


def step_rows(store: Store, order: Order, step: int) -> StepRows:
    """The documents that a step trains on; steps count from 1."""
    reader, documents, hashes = store.reader("train"), [], {}
    for slot in range(order.global_batch):
        if (place := order.place(step - 1, slot)) is None:
            continue
        pack = reader.pack(place)
        hashes[slot] = batchid.pack_hash(pack["docs"])
        ends = np.cumsum(pack["lengths"])
        for doc, length, end in zip(pack["docs"].tolist(), pack["lengths"], ends, strict=True):
            ids = np.append(pack["ids"][end - length : end], pack["targets"][end - 1])
            documents.append(Document(slot, doc, ids))
    return StepRows(tuple(documents), batchid.text(batchid.total(hashes)))


def origins(store: Store, docs: Iterable[int], most_bytes: int | None = None) -> dict[int, Origin]:
    """Where rows come from, by their ids. Each file is read once, as far as its last such row.

    Args:
        store: that has the rows.
        docs: ids of rows.
        most_bytes: larger files are not read.
    """
    files = store.manifest.files
    wanted: dict[int, set[int]] = defaultdict(set)
    for doc in docs:
        file, row = file_and_row(doc)
        wanted[file].add(row)
    found: dict[int, Origin] = {}
    for file, rows in wanted.items():
        row_format = store.manifest.formats[files[file]]
        read = {row.index: row for row in _read(files[file], max(rows), most_bytes) if row.index in rows}
        for index in rows:
            there = read.get(index, Row(index, None, None, None))
            found[doc_id(file, index)] = Origin(files[file], index, there.line, _text(there, row_format))
    return found


def name_rows(store: Store, order: Order, step: int) -> str:
    """A few rows of a step's batch in words."""
    try:
        documents = step_rows(store, order, step).documents
        docs = list(dict.fromkeys(document.doc for document in documents))
        named = docs[:NAMED_DOCUMENTS]
        places = origins(store, named, QUICKLY_READ)
    except Exception as error:  # whatever is wrong with the store, the message at hand is worth more
        return f"its rows can't be read from {store.path}: {error}"
    more = f" and {len(docs) - len(named):,} more" if len(docs) > len(named) else ""
    return f"its rows: {'; '.join(str(places[doc]) for doc in named)}{more}"


def _read(path: str, last: int, most_bytes: int | None) -> Iterator[Row]:
    """The rows of a file up to `last`; none of a file that is not there any more, too large, or of the hub."""
    with contextlib.suppress(UserError, OSError, pa.ArrowException):
        if not _is_path(path):
            return
        (file,) = expand(path)
        if most_bytes is not None and file.size > most_bytes:
            return
        for row in read_rows(file):
            yield row
            if row.index >= last:
                return


def _is_path(path: str) -> bool:
    return "://" in path or path.startswith("/")


def _text(row: Row, row_format: str) -> str | None:
    if row.value is None:
        return None
    try:
        example = to_example(row.value, row_format)
    except RowError:  # the file has changed
        return None
    if example.text is not None:
        return example.text
    asked = [message for message in example.messages if message["role"] == "user"]
    return str((asked or example.messages)[0].get("content") or "")
