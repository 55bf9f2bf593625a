"""Prepared stores without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds.data.labels import Label
from raytune_ds.data.store import ROW_GROUP, Manifest, Split, Store, doc_id, pack_documents, write_tables

DOCUMENTS = pa.schema(
    {"ids": pa.list_(pa.int32()), "weights": pa.list_(pa.float32()), "doc": pa.int64(), "label": pa.int8()}
)


def write_table(table: pa.Table, path: str) -> None:
    """A table as one shard of a store."""
    write_tables([table], path, table.schema)


def store_of(folder: Path, num_packs: int, files: Sequence[str] = ("/rows.jsonl",), **changes: Any) -> Store:
    """A store at `folder` of packs of one to three documents, one a row, from all files in turn."""
    formats = changes.pop("formats", None)
    rng = np.random.default_rng(num_packs)
    sizes = rng.integers(1, 4, num_packs)
    members = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    lengths = rng.integers(3, 9, sizes.sum())
    docs = [doc_id(row % len(files), row // len(files)) for row in range(len(lengths))]
    return write_store(
        folder, [m.tolist() for m in members], docs, lengths.tolist(), files, formats, **changes
    )


def write_store(
    folder: Path,
    packs: list[list[int]],
    docs: list[int],
    lengths: list[int],
    files: Sequence[str] = ("/rows.jsonl",),
    formats: Sequence[str] | None = None,
    **changes: Any,
) -> Store:
    """A store at `folder` of these packs of documents, given by the ids of their rows and their numbers of tokens.

    `changes` are of the manifest; `ids` the tokens of some of the documents, by number.
    """
    given = changes.pop("ids", {})
    ids = [given.get(number, [number % 50 + 1] * length) for number, length in enumerate(lengths)]
    table = pa.table(
        {"ids": ids, "weights": [[1.0] * n for n in lengths], "doc": docs, "label": [Label.PLAIN] * len(ids)},
        schema=DOCUMENTS,
    )
    packed = pack_documents(packs, table)
    first = len(packs) // 2 // ROW_GROUP * ROW_GROUP  # a shard has whole row groups, but for the last one
    shards = []
    for number, part in enumerate((packed.slice(0, first), packed.slice(first))):
        if part.num_rows:
            write_table(part, f"{folder}/train-{number}.parquet")
            shards.append((f"train-{number}.parquet", part.num_rows))
    num_tokens = sum(lengths) - len(lengths)
    train = Split(tuple(shards), len(packs), len(docs), num_tokens, num_tokens)
    made = Manifest(
        **{
            "fingerprint": folder.name,
            "seq_len": 32,
            "train": train,
            "eval": Split(),
            "files": tuple(files),
            "formats": dict(zip(files, formats or ["alpaca"] * len(files), strict=True)),
            "tokenizer": "tiny",
            "num_rows": len(set(docs)),
            "num_rejected": 0,
            "rejected_reasons": {},
            "num_truncated": 0,
            "num_dropped_long": 0,
            "length_histogram": {},
        }
        | changes
    )
    (folder / "manifest.json").write_text(made.to_json(), encoding="utf-8")
    return Store(str(folder), made)
