"""Buckets of sequences to shards of packs: the work of one task, and of the one that comes after all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds import storage
from raytune_ds.data.labels import units
from raytune_ds.data.packing import first_fit_decreasing
from raytune_ds.data.scatter import DOCUMENT_SCHEMA, Job, bucket_dir, memory_mib
from raytune_ds.data.store import (
    PACK_SCHEMA,
    ROW_GROUP,
    Split,
    pack_documents,
    read_table,
    write_table,
    write_tables,
)


def pack_bucket(batch: dict[str, np.ndarray], job: Job, threshold: int) -> dict[str, list[dict[str, Any]]]:
    """One bucket, sorted and split, to whole row groups of packs, and a rest."""
    bucket = int(batch["bucket"][0])
    result: dict[str, Any] = {"bucket": bucket}
    directory = bucket_dir(job, bucket)
    parts = [read_table(f"{directory}/{name}") for name in storage.list_names(directory) if name[0] != "."]
    documents = pa.concat_tables(parts) if parts else DOCUMENT_SCHEMA.empty_table()
    documents = documents.sort_by([(name, "ascending") for name in ("key", "doc", "piece")])
    held_out = documents.column("eval_key").to_numpy() <= np.uint64(threshold)
    for split, chosen in (("train", ~held_out), ("eval", held_out)):
        packs = _pack(documents.filter(pa.array(chosen)), job)
        whole = packs.num_rows // ROW_GROUP * ROW_GROUP
        if whole:
            write_table(packs.slice(0, whole), f"{job.target}/{split}-{bucket:06d}.parquet")
        write_table(packs.slice(whole), f"{job.scratch}/rest-{split}-{bucket:06d}.parquet")
        result[split] = {"whole": whole, "rest": packs.num_rows - whole, **_counts(packs)}
    result["peak_memory_mib"] = memory_mib()
    return {"packed": [result]}


def _pack(documents: pa.Table, job: Job) -> pa.Table:
    """Documents to packs in random order: first-fit-decreasing leaves the long ones in front."""
    if documents.num_rows == 0:
        return PACK_SCHEMA.empty_table()
    packs = _pack_units(documents, job.seq_len)
    shuffled = np.random.default_rng(job.seed).permutation(len(packs))
    return pack_documents([packs[i] for i in shuffled], documents)


def _pack_units(documents: pa.Table, capacity: int) -> list[list[int]]:
    """The rows of each pack; both answers of a pair are in one, the rejected behind the chosen."""
    lengths = np.diff(documents.column("ids").combine_chunks().offsets.to_numpy()) - 1
    bounds = units(documents.column("doc").to_numpy(), documents.column("label").to_numpy())
    packs = first_fit_decreasing(np.add.reduceat(lengths, bounds[:-1]), capacity)
    rows = [range(start, end) for start, end in pairwise(bounds.tolist())]
    return [[row for unit in pack for row in rows[unit]] for pack in packs]


def _counts(packs: pa.Table) -> dict[str, int]:
    weights = packs.column("weights").combine_chunks().values.to_numpy()
    return {
        "num_docs": len(packs.column("docs").combine_chunks().values),
        "num_tokens": len(weights),
        "num_supervised": int(np.count_nonzero(weights)),
    }


def finish_split(job: Job, split: str, results: Sequence[dict[str, Any]]) -> Split:
    """Writes the last shard, from the rests of all buckets, and adds everything up."""
    shards = [(f"{split}-{r['bucket']:06d}.parquet", r[split]["whole"]) for r in results if r[split]["whole"]]
    num_rest = sum(r[split]["rest"] for r in results)
    if num_rest:
        name = f"{split}-last.parquet"
        rests = (read_table(f"{job.scratch}/rest-{split}-{r['bucket']:06d}.parquet") for r in results)
        write_tables(rests, f"{job.target}/{name}", PACK_SCHEMA)
        shards.append((name, num_rest))
    total = {name: sum(r[split][name] for r in results) for name in _counts(PACK_SCHEMA.empty_table())}
    return Split(shards=tuple(shards), num_packs=sum(packs for _, packs in shards), **total)
