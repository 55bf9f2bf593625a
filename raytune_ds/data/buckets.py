"""Buckets of sequences to shards of packs: the work of one task, and of the one that comes after all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds import storage
from raytune_ds.data.chunks import bucket_documents, final_order, give_back
from raytune_ds.data.job import Job
from raytune_ds.data.labels import units
from raytune_ds.data.mixture import times_drawn
from raytune_ds.data.packing import first_fit_decreasing
from raytune_ds.data.scatter import memory_mib
from raytune_ds.data.store import (
    PACK_SCHEMA,
    ROW_GROUP,
    SPLITS,
    Part,
    Split,
    in_one,
    pack_documents,
    read_table,
    write_tables,
)

Quotas = Mapping[int, int]
"""By source, the rows that a bucket gives of it; sources that are not there give all of theirs, once."""
# Packs that are in memory beside the documents that they are made of.
_AT_ONCE = 2 * ROW_GROUP


def count_bucket(bucket: int, job: Job, thresholds: tuple[int, ...]) -> tuple[int, list[int]]:
    """A bucket, and its rows of each source that are trained on."""
    documents = bucket_documents(job, bucket, ("eval_key", "piece", "doc"))
    sources = _sources_of(documents, job)
    held_out = documents.column("eval_key").to_numpy() <= np.array(thresholds, np.uint64)[sources]
    rows = sources[~held_out & (_pieces(documents) == 0)]
    return bucket, np.bincount(rows, minlength=len(job.sources)).tolist()


def pack_bucket(
    bucket: int, job: Job, thresholds: tuple[int, ...], quotas: Mapping[int, Quotas]
) -> dict[str, Any]:
    """One bucket, sorted, split and mixed, to whole row groups of packs, and a rest.

    Args:
        bucket: its number.
        job: whose chunks are all done.
        thresholds: by source, the highest eval key that is held out.
        quotas: by bucket; see Quotas.
    """
    note = f"{job.scratch}/packed/{bucket:06d}.json"
    result: dict[str, Any] | None = storage.read_json(note)
    if result is None:
        result = _pack_bucket(bucket, job, thresholds, quotas.get(bucket, {}))
        storage.write_json(note, result)
    give_back()
    return result


def _pack_bucket(bucket: int, job: Job, thresholds: tuple[int, ...], quotas: Quotas) -> dict[str, Any]:
    documents = bucket_documents(job, bucket)
    highest = np.array(thresholds, np.uint64)[_sources_of(documents, job)]
    held_out = documents.column("eval_key").to_numpy() <= highest
    order = final_order(documents)
    trained = _mixed(documents, order[~held_out[order]], job, quotas)
    result: dict[str, Any] = {"bucket": bucket, "num_docs": documents.num_rows}
    for split, rows in zip(SPLITS, (trained, order[held_out[order]]), strict=True):
        result[split] = _write_packs(documents, rows, job, f"{split}-{bucket:06d}.parquet")
    result["peak_memory_mib"] = memory_mib()
    return result


def _mixed(documents: pa.Table, rows: np.ndarray, job: Job, quotas: Quotas) -> np.ndarray:
    """Rows of documents as often as the mixture has them, round by round; a row's sequences stay together."""
    if not quotas:
        return rows
    sources, docs = _sources_of(documents, job)[rows], documents.column("doc").to_numpy()[rows]
    draws = documents.column("eval_key").to_numpy()[rows]
    times = np.ones(len(docs), np.int64)
    for source, quota in quotas.items():
        mine = np.flatnonzero(sources == source)
        _, first, of_row = np.unique(docs[mine], return_index=True, return_inverse=True)
        times[mine] = times_drawn(draws[mine][first], quota)[of_row]
    rounds = [rows[times > number] for number in range(int(times.max(initial=0)))]
    return np.concatenate([rows[:0], *rounds])


def _sources_of(documents: pa.Table, job: Job) -> np.ndarray:
    return job.sources_of(documents.column("doc").to_numpy())


def _pieces(documents: pa.Table) -> np.ndarray:
    return np.asarray(documents.column("piece").to_numpy())


def _write_packs(documents: pa.Table, rows: np.ndarray, job: Job, name: str) -> dict[str, Any]:
    """Writes rows of documents as packs, whole row groups to the store and the rest aside, a few packs at a time."""
    packs = _pack(documents, rows, job) if len(rows) else []
    whole = len(packs) // ROW_GROUP * ROW_GROUP
    parts = np.zeros((len(job.sources), 3), np.int64)

    def write(some: Sequence[Sequence[int]], path: str) -> None:
        write_tables(_counted(_tables(documents, some), parts, job), path, PACK_SCHEMA)

    if whole:
        write(packs[:whole], f"{job.target}/{name}")
    write(packs[whole:], f"{job.scratch}/rest-{name}")
    return {"whole": whole, "rest": len(packs) - whole, "parts": parts.tolist()}


def _tables(documents: pa.Table, packs: Sequence[Sequence[int]]) -> Iterator[pa.Table]:
    return (pack_documents(packs[at : at + _AT_ONCE], documents) for at in range(0, len(packs), _AT_ONCE))


def _counted(tables: Iterator[pa.Table], parts: np.ndarray, job: Job) -> Iterator[pa.Table]:
    """Tables of packs; adds to `parts` what each source has in them: documents, tokens, supervised targets."""
    for packs in tables:
        lengths, docs, weights = (
            in_one(packs.column(name)).flatten().to_numpy() for name in ("lengths", "docs", "weights")
        )
        supervised = np.add.reduceat(weights != 0, np.cumsum(lengths) - lengths, dtype=np.int64)
        sources = job.sources_of(docs)
        for place, count in enumerate((None, lengths, supervised)):
            parts[:, place] += np.bincount(sources, count, len(job.sources)).astype(np.int64)
        yield packs


def _pack(documents: pa.Table, rows: np.ndarray, job: Job) -> list[list[int]]:
    """Rows of documents to packs in random order: first-fit-decreasing leaves the long ones in front."""
    packs = _pack_units(documents, rows, job.seq_len)
    shuffled = np.random.default_rng(job.seed).permutation(len(packs))
    return [packs[i] for i in shuffled]


def _pack_units(documents: pa.Table, rows: np.ndarray, capacity: int) -> list[list[int]]:
    """The rows of each pack; both answers of a pair are in one, the rejected behind the chosen."""
    lengths = np.diff(in_one(documents.column("ids")).offsets.to_numpy())[rows] - 1
    bounds = units(documents.column("doc").to_numpy()[rows], documents.column("label").to_numpy()[rows])
    packs = first_fit_decreasing(np.add.reduceat(lengths, bounds[:-1]), capacity)
    of_unit = [rows[start:end].tolist() for start, end in pairwise(bounds.tolist())]
    return [[row for unit in pack for row in of_unit[unit]] for pack in packs]


def finish_split(job: Job, split: str, results: Sequence[dict[str, Any]]) -> Split:
    """Writes the last shard, from the rests of all buckets, and adds everything up."""
    shards = [(f"{split}-{r['bucket']:06d}.parquet", r[split]["whole"]) for r in results if r[split]["whole"]]
    num_rest = sum(r[split]["rest"] for r in results)
    if num_rest:
        name = f"{split}-last.parquet"
        rests = (read_table(f"{job.scratch}/rest-{split}-{r['bucket']:06d}.parquet") for r in results)
        write_tables(rests, f"{job.target}/{name}", PACK_SCHEMA)
        shards.append((name, num_rest))
    total = np.array([r[split]["parts"] for r in results], np.int64).sum(axis=0)
    docs, tokens, supervised = total.sum(axis=0).tolist()
    return Split(
        shards=tuple(shards),
        num_packs=sum(packs for _, packs in shards),
        num_docs=docs,
        num_tokens=tokens,
        num_supervised=supervised,
        sources={s.name: Part(*total[s.index].tolist()) for s in job.sources if total[s.index].any()},
    )
