"""Buckets of sequences to shards of packs: the work of one task, and of the one that comes after all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds import storage
from raytune_ds.data.chunks import bucket_documents
from raytune_ds.data.job import Job
from raytune_ds.data.labels import units
from raytune_ds.data.mixture import times_drawn
from raytune_ds.data.packing import first_fit_decreasing
from raytune_ds.data.scatter import memory_mib
from raytune_ds.data.store import (
    FILE_SHIFT,
    PACK_SCHEMA,
    ROW_GROUP,
    SPLITS,
    Part,
    Split,
    pack_documents,
    read_table,
    write_table,
    write_tables,
)

Quotas = Mapping[int, int]
"""By source, the rows that a bucket gives of it; sources that are not there give all of theirs, once."""


def count_bucket(batch: dict[str, np.ndarray], job: Job, thresholds: tuple[int, ...]) -> dict[str, list[Any]]:
    """The rows of each source in a bucket that are trained on, by its index."""
    bucket = int(batch["bucket"][0])
    documents = bucket_documents(job, bucket, ("eval_key", "piece", "doc"))
    sources = _sources_of(documents, job)
    held_out = documents.column("eval_key").to_numpy() <= np.array(thresholds, np.uint64)[sources]
    rows = sources[~held_out & (_pieces(documents) == 0)]
    return {"bucket": [bucket], "rows": [np.bincount(rows, minlength=len(job.sources))]}


def pack_bucket(
    batch: dict[str, np.ndarray], job: Job, thresholds: tuple[int, ...], quotas: Mapping[int, Quotas]
) -> dict[str, list[Any]]:
    """One bucket, sorted, split and mixed, to whole row groups of packs, and a rest.

    Args:
        batch: with the number of the bucket.
        job: whose chunks are all done.
        thresholds: by source, the highest eval key that is held out.
        quotas: by bucket; see Quotas.
    """
    bucket = int(batch["bucket"][0])
    note = f"{job.scratch}/packed/{bucket:06d}.json"
    result: dict[str, Any] | None = storage.read_json(note)
    if result is None:
        result = _pack_bucket(bucket, job, thresholds, quotas.get(bucket, {}))
        storage.write_json(note, result)
    return {"packed": [result]}


def _pack_bucket(bucket: int, job: Job, thresholds: tuple[int, ...], quotas: Quotas) -> dict[str, Any]:
    result: dict[str, Any] = {"bucket": bucket}
    documents = bucket_documents(job, bucket)
    sources = _sources_of(documents, job)
    held_out = documents.column("eval_key").to_numpy() <= np.array(thresholds, np.uint64)[sources]
    result["num_docs"] = documents.num_rows
    trained = documents.filter(pa.array(~held_out))
    chosen = {"train": _mixed(trained, job, quotas), "eval": documents.filter(pa.array(held_out))}
    for split in SPLITS:
        packs = _pack(chosen[split], job)
        whole = packs.num_rows // ROW_GROUP * ROW_GROUP
        if whole:
            write_table(packs.slice(0, whole), f"{job.target}/{split}-{bucket:06d}.parquet")
        write_table(packs.slice(whole), f"{job.scratch}/rest-{split}-{bucket:06d}.parquet")
        parts = _parts(packs, job)
        result[split] = {"whole": whole, "rest": packs.num_rows - whole, "parts": parts}
    result["peak_memory_mib"] = memory_mib()
    return result


def _mixed(documents: pa.Table, job: Job, quotas: Quotas) -> pa.Table:
    """The documents as often as the mixture has them, round by round; a row's sequences stay together."""
    if not quotas:
        return documents
    sources, docs = _sources_of(documents, job), documents.column("doc").to_numpy()
    draws = documents.column("eval_key").to_numpy()
    times = np.ones(len(docs), np.int64)
    for source, quota in quotas.items():
        mine = np.flatnonzero(sources == source)
        _, first, of_row = np.unique(docs[mine], return_index=True, return_inverse=True)
        times[mine] = times_drawn(draws[mine][first], quota)[of_row]
    rounds = [np.flatnonzero(times > number) for number in range(int(times.max(initial=0)))]
    return documents.take(pa.array(np.concatenate(rounds)) if rounds else pa.array([], pa.int64()))


def _sources_of(documents: pa.Table, job: Job) -> np.ndarray:
    return np.array(job.source_of_file)[documents.column("doc").to_numpy() >> FILE_SHIFT]


def _pieces(documents: pa.Table) -> np.ndarray:
    return np.asarray(documents.column("piece").to_numpy())


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


def _parts(packs: pa.Table, job: Job) -> list[list[int]]:
    """What each source has in packs: documents, tokens, supervised targets."""
    docs = packs.column("docs").combine_chunks().values.to_numpy()
    lengths = packs.column("lengths").combine_chunks().values.to_numpy()
    weights = packs.column("weights").combine_chunks().values.to_numpy()
    sources = np.array(job.source_of_file)[docs >> FILE_SHIFT]
    ends = np.concatenate([[0], np.cumsum(weights != 0)])[np.cumsum(np.append(0, lengths))]
    columns = (np.bincount(sources, counts, len(job.sources)) for counts in (None, lengths, np.diff(ends)))
    return np.stack(list(columns), axis=1).astype(int).tolist()


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
