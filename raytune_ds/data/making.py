"""Makes the packed store, on all CPUs of the cluster.

    files -> chunks of rows -> sequences, by bucket (scatter.py) -> each bucket looked through for doubles
    (duplicates.py), then sorted, mixed, packed and written (buckets.py)

A task holds a few chunks of rows or one bucket, both of bounded size, so memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

from raytune_ds import storage
from raytune_ds.config import Config
from raytune_ds.console import ProgressLine, human_count, say
from raytune_ds.data import tasks
from raytune_ds.data.buckets import Quotas, count_bucket, finish_split, pack_bucket
from raytune_ds.data.chunks import expected, finished, read_tally
from raytune_ds.data.duplicates import Doubles, find_doubles
from raytune_ds.data.gate import conclude
from raytune_ds.data.job import Job, Tally
from raytune_ds.data.mixture import quotas, shared_out
from raytune_ds.data.scatter import encode_chunks, read_chunks
from raytune_ds.data.store import Manifest, Split
from raytune_ds.errors import UserError

T = TypeVar("T")

SHOWN_BAD_ROWS = 5
_TASKS_A_CPU = 4
_LARGEST_TASK = 4 << 20
_LEAST_SHARE = 64 << 20
_FILE = 256 << 10  # what opening a file costs, in bytes that are read meanwhile


class _UnfitError(UserError):
    """The rows are no good as they are."""


def make(job: Job, config: Config, fingerprint: str) -> Manifest:
    """Makes the store of `job`, or goes on with what was made of it before a kill.

    Args:
        job: what is made.
        config: that it was made of.
        fingerprint: of the store.

    Raises:
        UserError: a source can't be read, a row is bad and `data.on_bad_row` is fail, nothing is left to train on.
    """
    started = time.monotonic()
    if done := len(finished(job)):
        say(f"data: going on with a preparation that was stopped, {done:,} of its chunks are done")
    try:
        manifest, peak_memory_mib = _run(job, config, fingerprint)
    except _UnfitError:  # whoever mends the rows asks for another store
        storage.delete_dir(job.scratch)
        raise
    seconds = time.monotonic() - started
    making = {"seconds": round(seconds, 3), "peak_memory_mib": round(peak_memory_mib, 1)}
    for name in storage.list_names(job.target):
        if name.startswith("."):  # begun by a task that was killed
            storage.delete_file(f"{job.target}/{name}")
    storage.write_json(f"{job.target}/making.json", making)
    storage.write_bytes(f"{job.target}/manifest.json", manifest.to_json().encode())
    storage.delete_dir(job.scratch)
    return manifest


def _run(job: Job, config: Config, fingerprint: str) -> tuple[Manifest, float]:
    tally = _scatter(job, fail=config.data.on_bad_row == "fail")
    thresholds = _eval_thresholds(job, config.data.eval.fraction, tally)
    with _over_buckets(job, "looking for duplicates", find_doubles, thresholds=thresholds) as looking:
        train, evaluation = _pack_buckets(job, thresholds, _quotas(job, thresholds), tally)
        doubles = Doubles.of(looking)
    if train.num_packs == 0:
        raise _UnfitError(_nothing_left(job, tally))
    if tally.num_rejected:
        _list_rejected(job)
        say(f"data: {tally.num_rejected:,} bad rows skipped; why, is in {job.target}/rejected.jsonl")
    manifest = Manifest(
        fingerprint=fingerprint,
        seq_len=job.seq_len,
        train=train,
        eval=evaluation,
        **job.places,
        tokenizer=job.tokenizer.name,
        num_rows=tally.num_rows,
        num_rejected=tally.num_rejected,
        rejected_reasons=dict(sorted(tally.reasons.items(), key=lambda item: (-item[1], item[0]))[:20]),
        num_truncated=tally.num_truncated,
        num_dropped_long=tally.num_dropped_long,
        num_split=tally.num_split,
        length_histogram={upper: tally.lengths[upper] for upper in sorted(tally.lengths, key=int)},
        reasoning=dict(sorted(tally.turns.items())),
        findings=conclude(tally, doubles),
    )
    return manifest, tally.peak_memory_mib


def _list_rejected(job: Job) -> None:
    """All bad rows, each with its reason, as they come in the sources."""
    tallies = (read_tally(job, name) for name in sorted(expected(job)))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for tally in tallies for row in tally.rejected)
    storage.write_lines(f"{job.target}/rejected.jsonl", lines)


def _task_chars(job: Job) -> int:
    """Text that one task encodes, a chunk after the other: all CPUs have work, and not much of it is to begin tasks."""
    return int(max(job.chunk_chars, min(job.text_bytes / (_TASKS_A_CPU * tasks.num_cpus()), _LARGEST_TASK)))


def _shares(job: Job) -> Iterator[list[int]]:
    """The files that one task reads, the small ones together."""
    share, size = list[int](), 0
    for number, item in enumerate(job.inputs):
        share.append(number)
        size += item.text_bytes + _FILE
        if size >= _LEAST_SHARE:
            yield share
            share, size = [], 0
    if share:
        yield share


def _scatter(job: Job, fail: bool) -> Tally:
    """Encodes all rows and scatters the sequences over the buckets."""
    total, names = Tally(), list[str]()
    started = time.monotonic()
    told_readers = {"job": job, "done": finished(job), "task_chars": _task_chars(job)}
    with (
        ProgressLine("preparing", job.text_bytes) as progress,
        tasks.each_read(read_chunks, _shares(job), told_readers, encode_chunks, job=job) as encoded,
    ):
        for name, tally in chain.from_iterable(encoded):
            names.append(name)
            total.add(tally)
            fatal = [row for row in tally.rejected if row["fatal"]]
            if fatal or (fail and tally.rejected):
                raise _UnfitError(_bad_rows(fatal or tally.rejected, total.num_rows))
            rate = total.num_rows / max(1e-3, time.monotonic() - started)
            progress.update(
                total.num_bytes, f"{human_count(total.num_rows)} rows, {human_count(rate)} rows/s"
            )
    if sorted(names) != sorted(expected(job)):
        raise RuntimeError(f"not each chunk of rows was heard of once: {len(names)} of {len(expected(job))}")
    return total


def _eval_thresholds(job: Job, fraction: float, tally: Tally) -> tuple[int, ...]:
    """By source: its rows whose eval key is not above this are held out, the configured share but at least one.

    Of a source's only row none is.
    """
    share = int(fraction * (1 << 64))
    return tuple(
        max(share, tally.lowest_eval_key[source.index]) if share and tally.usable[source.index] > 1 else 0
        for source in job.sources
    )


@contextlib.contextmanager
def _over_buckets(job: Job, label: str, work: Callable[..., T], **told: Any) -> Iterator[Iterator[T]]:
    """What `work` tells of each bucket, as the buckets are done. The first of them are begun before it is asked for."""
    with tasks.each(work, range(job.num_buckets), job=job, **told) as done:
        yield done if job.num_buckets == 1 else _shown(done, label, job.num_buckets)


def _shown(done: Iterator[T], label: str, num_buckets: int) -> Iterator[T]:
    with ProgressLine(label, num_buckets) as progress:
        for number, told in enumerate(done, 1):
            yield told
            progress.update(number, f"bucket {number:,} of {num_buckets:,}")


def _quotas(job: Job, thresholds: tuple[int, ...]) -> dict[int, Quotas]:
    """By bucket, the rows that it gives of each source; none where all give all of theirs."""
    trained = [source for source in job.sources if not source.held_out]
    if not any(source.is_mixed for source in trained):
        return {}
    with _over_buckets(job, "counting", count_bucket, thresholds=thresholds) as counted:
        buckets = sorted(counted)
    counts = {source.index: [rows[source.index] for _, rows in buckets] for source in trained}
    if empty := [source.path for source in trained if not sum(counts[source.index])]:
        raise _UnfitError(
            f"data.sources: {', '.join(empty)}: no row is left to train on, so there is nothing to mix."
        )
    wanted = quotas(trained, [sum(counts[source.index]) for source in trained])
    shares = {
        source.index: shared_out(quota, counts[source.index])
        for source, quota in zip(trained, wanted, strict=True)
    }
    return {bucket: {s: shares[s][bucket] for s in shares} for bucket, _ in buckets}


def _pack_buckets(
    job: Job, thresholds: tuple[int, ...], shares: dict[int, Quotas], tally: Tally
) -> tuple[Split, Split]:
    """Packs all buckets; what does not fill a row group of its bucket is gathered in one last shard a split.

    Raises:
        RuntimeError: not all that was scattered has arrived.
    """
    with _over_buckets(job, "packing", pack_bucket, thresholds=thresholds, quotas=shares) as packed:
        results = list(packed)
    tally.peak_memory_mib = max(tally.peak_memory_mib, *(result["peak_memory_mib"] for result in results))
    if (arrived := sum(result["num_docs"] for result in results)) != tally.num_docs:
        raise RuntimeError(
            f"{arrived} of {tally.num_docs} documents arrived in {job.scratch}: does every node see the same storage?"
        )
    results.sort(key=lambda result: result["bucket"])
    return finish_split(job, "train", results), finish_split(job, "eval", results)


def _bad_rows(rejected: list[dict[str, Any]], num_rows: int) -> str:
    shown = [f"{row['where']}: {row['reason']}" for row in rejected[:SHOWN_BAD_ROWS]]
    more = f"... and {len(rejected) - len(shown)} more" if len(rejected) > len(shown) else ""
    advice = (
        "The rest of that file can't be read: repair it."
        if rejected[0]["fatal"]
        else f"That is {len(rejected)} bad of the first {num_rows} rows. Repair them, or set data.on_bad_row=skip to "
        "leave them out (a file will name each with its reason)."
    )
    return "\n".join(line for line in (*shown, more, advice) if line)


def _nothing_left(job: Job, tally: Tally) -> str:
    reasons = Counter(tally.reasons)
    if tally.num_dropped_long:
        reasons[f"longer than data.seq_len = {job.seq_len} tokens with nothing supervised within it"] = (
            tally.num_dropped_long
        )
    listed = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common(3))
    return f"data.sources: of {tally.num_rows} rows none is left to train on" + (
        f" ({listed})." if listed else "."
    )
