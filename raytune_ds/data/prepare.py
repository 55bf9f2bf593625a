"""Sources to the packed store: a Ray Data job that streams, before any process group exists.

    files -> rows -> sequences, scattered over buckets (scatter.py) -> each bucket sorted, packed, written (buckets.py)

A task holds a block of rows or one bucket, both of bounded size, so memory does not grow with the data.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray.data

from raytune_ds import storage
from raytune_ds.config import Config
from raytune_ds.console import ProgressLine, human_count, human_time, say
from raytune_ds.data import tokenizer as tokenizers
from raytune_ds.data.buckets import finish_split, pack_bucket
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.prepared import fingerprint_of
from raytune_ds.data.scatter import Job, Tally, encode_block, read_blocks
from raytune_ds.data.store import Manifest, Split, Store
from raytune_ds.data.stream import quiet
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.errors import UserError

SHOWN_BAD_ROWS = 5
_MIB = 1 << 20


def prepare(config: Config, inputs: Inputs, tokenizer: TokenizerSpec, path: str) -> Store:
    """Finds the store of `config` below `path`, or makes it.

    Args:
        config: its data section and seed decide the content; the objective says which rows it takes, but rows that
            two objectives take become the same tokens and weights, so it is no part of the fingerprint.
        inputs: of that section.
        tokenizer: of the model.
        path: the folder of all stores.

    Raises:
        UserError: a source can't be read, the objective does not take its rows, a row is bad and `data.on_bad_row`
            is fail, nothing is left to train on.
    """
    inputs.require_formats_of(config.objective.kind)
    if inputs.has_conversations:
        _require_chat_template(tokenizer)
    fingerprint = fingerprint_of(config, inputs, tokenizer)
    target = f"{path}/{fingerprint}"
    if (found := Store.find(target)) is not None:
        say(f"data: prepared before, {_summary(found.manifest)}")
        return found
    job = Job(
        inputs=inputs.items,
        text_bytes=inputs.text_bytes,
        tokenizer=tokenizer,
        seq_len=config.data.seq_len,
        on_long_row=config.data.on_long_row,
        last_turn_only=config.data.supervise == "last-turn",
        thinking=config.data.thinking,
        seed=config.run.seed,
        eval_fraction=config.data.eval.fraction,
        num_buckets=max(1, inputs.text_bytes // (config.data.prepare_memory_mib * _MIB)),
        scratch=f"{path}/.scratch-{fingerprint}-{uuid.uuid4().hex[:8]}",
        target=target,
    )
    try:
        manifest = _run(job, config, fingerprint)
    finally:
        storage.delete_dir(job.scratch)
    say(f"data: {_summary(manifest)}, in {human_time(manifest.seconds)}")
    return Store(target, manifest)


def _run(job: Job, config: Config, fingerprint: str) -> Manifest:
    started = time.monotonic()
    with _blocks_of(max(1, config.data.prepare_memory_mib // 2)):
        tally, rejected = _scatter(job, fail=config.data.on_bad_row == "fail")
        threshold = _eval_threshold(job, tally)
        train, evaluation = _pack_buckets(job, threshold, tally)
    if (packed := train.num_docs + evaluation.num_docs) != tally.num_docs:
        raise RuntimeError(
            f"{packed} of {tally.num_docs} documents arrived in {job.scratch}: does every node see the same storage?"
        )
    if train.num_packs == 0:
        raise UserError(_nothing_left(job, tally, rejected))
    if rejected:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
        storage.write_bytes(f"{job.target}/rejected.jsonl", lines.encode())
        say(f"data: {len(rejected)} bad rows skipped; the reason for each is in {job.target}/rejected.jsonl")
    manifest = Manifest(
        fingerprint=fingerprint,
        seq_len=job.seq_len,
        train=train,
        eval=evaluation,
        files=tuple(item.file.path for item in job.inputs),
        formats={item.file.path: item.format for item in job.inputs},
        tokenizer=job.tokenizer.name,
        num_rows=tally.num_rows,
        num_rejected=len(rejected),
        rejected_reasons=dict(Counter(row["reason"] for row in rejected).most_common(20)),
        num_truncated=tally.num_truncated,
        num_dropped_long=tally.num_dropped_long,
        num_split=tally.num_split,
        length_histogram=dict(tally.lengths),
        reasoning=dict(sorted(tally.turns.items())),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_mib=round(tally.peak_memory_mib, 1),
    )
    storage.write_bytes(f"{job.target}/manifest.json", manifest.to_json().encode())
    return manifest


def _require_chat_template(spec: TokenizerSpec) -> None:
    if not tokenizers.load_tokenizer(spec).chat_template:
        raise UserError(
            f"model.name = {spec.name}: its tokenizer has no chat template, so conversations can't be rendered.\n"
            "Take the chat or instruct version of the model, or set data.chat_template to a .jinja file."
        )


@contextlib.contextmanager
def _blocks_of(mib: int) -> Iterator[None]:
    """Lets Ray Data make blocks of at most so many MiB in this job."""
    quiet()
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = mib * _MIB
    try:
        yield
    finally:
        context.target_max_block_size = before


def _scatter(job: Job, fail: bool) -> tuple[Tally, list[dict[str, Any]]]:
    """Encodes all rows and scatters the sequences over the buckets."""
    rows = ray.data.from_items([{"input": i} for i in range(len(job.inputs))])
    # Less than a CPU, so that reading and encoding stay two stages, and several tasks encode one large file.
    rows = rows.map_batches(
        read_blocks, fn_kwargs={"job": job}, batch_size=1, num_cpus=0.25, zero_copy_batch=True
    )
    tallies = rows.map_batches(
        encode_block, fn_kwargs={"job": job}, batch_size=None, batch_format="pyarrow", num_cpus=1
    )
    total, rejected = Tally(), []
    started = time.monotonic()
    with ProgressLine("preparing", job.text_bytes) as progress:
        for row in tallies.iter_rows():
            tally: Tally = row["tally"]
            total.add(tally)
            rejected += tally.rejected
            fatal = [row for row in tally.rejected if row["fatal"]]
            if fatal or (fail and tally.rejected):
                raise UserError(_bad_rows(fatal or tally.rejected, total.num_rows))
            rate = total.num_rows / max(1e-3, time.monotonic() - started)
            progress.update(
                total.num_bytes, f"{human_count(total.num_rows)} rows, {human_count(rate)} rows/s"
            )
    return total, rejected


def _eval_threshold(job: Job, tally: Tally) -> int:
    """Rows whose eval key is not above this are held out: the configured share, but at least one row of several."""
    if job.eval_fraction == 0:
        return 0
    threshold = int(job.eval_fraction * (1 << 64))
    return max(threshold, tally.lowest_eval_key) if tally.num_rows > 1 else 0


def _pack_buckets(job: Job, threshold: int, tally: Tally) -> tuple[Split, Split]:
    """Packs all buckets; what does not fill a row group of its bucket is gathered in one last shard a split."""
    buckets = ray.data.from_items([{"bucket": i} for i in range(job.num_buckets)])
    packed = buckets.map_batches(
        pack_bucket, fn_kwargs={"job": job, "threshold": threshold}, batch_size=1, num_cpus=1
    )
    results: list[dict[str, Any]] = []
    with ProgressLine("packing", job.num_buckets) as progress:
        for row in packed.iter_rows():
            results.append(row["packed"])
            tally.peak_memory_mib = max(tally.peak_memory_mib, row["packed"]["peak_memory_mib"])
            progress.update(len(results), "buckets")
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


def _nothing_left(job: Job, tally: Tally, rejected: list[dict[str, Any]]) -> str:
    reasons = Counter(row["reason"] for row in rejected)
    if tally.num_dropped_long:
        reasons[f"longer than data.seq_len = {job.seq_len} tokens with nothing supervised within it"] = (
            tally.num_dropped_long
        )
    listed = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common(3))
    return f"data.sources: of {tally.num_rows} rows none is left to train on" + (
        f" ({listed})." if listed else "."
    )


def _summary(manifest: Manifest) -> str:
    """One line on a store."""
    train, held_out = manifest.train, manifest.eval
    room = train.num_packs * manifest.seq_len
    parts = [
        f"{manifest.num_rows:,} rows",
        f"{train.num_packs:,} packs of {manifest.seq_len:,} ({100 * train.num_tokens / room:.1f}% full)",
        f"{human_count(train.num_tokens)} tokens, {100 * train.num_supervised / train.num_tokens:.0f}% supervised",
        f"{held_out.num_docs:,} held out",
    ]
    if manifest.num_truncated:
        parts.append(f"{manifest.num_truncated:,} truncated")
    if manifest.num_dropped_long:
        parts.append(f"{manifest.num_dropped_long:,} dropped as too long")
    if manifest.num_split:
        parts.append(f"{manifest.num_split:,} long texts split")
    if manifest.num_rejected:
        parts.append(f"{manifest.num_rejected:,} bad rows skipped")
    return ", ".join(parts)
