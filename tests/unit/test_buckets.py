"""A bucket's way into the store: in whatever chunks its sequences lie, and however many packs are made at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raytune_ds.data import buckets
from raytune_ds.data.buckets import pack_bucket
from raytune_ds.data.job import Job
from raytune_ds.data.scatter import encode_chunks, read_chunks
from raytune_ds.data.store import ROW_GROUP, read_table
from tests.helpers import write_jsonl
from tests.unit.test_scatter import job_of

NUM_ROWS = 3000
HELD_OUT = 1 << 61
"""The highest eval key that is held out: an eighth of all."""


def encoded(folder: Path, model: Path, chunk_chars: int) -> Job:
    """A job of one bucket, all of whose chunks are done."""
    folder.mkdir()
    rows = [{"text": f"{i} is " + "word " * (i % 7 + 1)} for i in range(NUM_ROWS)]
    job = job_of(write_jsonl(folder / "rows.jsonl", rows), model, "drop", seq_len=64)
    job = replace(job, chunk_chars=chunk_chars, target=str(folder / "store"))
    for tasks in read_chunks([0], job, frozenset(), 1 << 14):
        encode_chunks(tasks, job)
    return job


def packed(job: Job) -> dict[str, pa.Table]:
    """Its packs by file, and what was told of them."""
    told = pack_bucket(0, job, thresholds=(HELD_OUT,), quotas={})
    files = {split: [f"{job.scratch}/rest-{split}-000000.parquet"] for split in ("train", "eval")}
    seen: list[int] = []
    for split, of_split in files.items():
        if told[split]["whole"]:
            of_split.append(f"{job.target}/{split}-000000.parquet")
        tables = [read_table(file) for file in of_split]
        assert [table.num_rows for table in tables] == [
            n for n in (told[split]["rest"], told[split]["whole"]) if n
        ]
        values = [table.column("weights").combine_chunks().values.to_numpy() for table in tables]
        docs = [table.column("docs").combine_chunks().values.to_numpy() for table in tables]
        sizes = [sum(map(len, docs)), sum(map(len, values)), sum(int((of > 0).sum()) for of in values)]
        assert told[split]["parts"] == [sizes]
        seen += np.concatenate(docs).tolist()
    assert sorted(seen) == list(range(NUM_ROWS))
    assert told["num_docs"] == sum(told[split]["parts"][0][0] for split in files) == NUM_ROWS
    return {file.rpartition("/")[2]: read_table(file) for of_split in files.values() for file in of_split}


def test_packs_depend_neither_on_chunks_nor_on_how_many_are_made_at_a_time(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = packed(encoded(tmp_path / "one", tiny_models["qwen2"], chunk_chars=1 << 20))
    assert at_once["train-000000.parquet"].num_rows > 4 * ROW_GROUP
    assert at_once["rest-eval-000000.parquet"].num_rows
    monkeypatch.setattr(buckets, "_AT_ONCE", ROW_GROUP)
    job = encoded(tmp_path / "many", tiny_models["qwen2"], chunk_chars=1 << 12)
    chunks = sorted(Path(job.scratch, "chunks").iterdir())
    for number, chunk in enumerate(reversed(chunks)):
        chunk.rename(chunk.with_name(f"a{number:06d}.arrow"))
    assert packed(job) == at_once


def test_an_empty_bucket_gives_nothing(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    job = replace(
        job_of(
            write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}]),
            tiny_models["qwen2"],
            "drop",
        ),
        num_buckets=2,
    )
    for tasks in read_chunks([0], job, frozenset(), 1):
        encode_chunks(tasks, job)
    told = [pack_bucket(bucket, job, thresholds=(0,), quotas={}) for bucket in (0, 1)]
    assert sorted(of["num_docs"] for of in told) == [0, 1]
    empty = min(told, key=lambda of: int(of["num_docs"]))
    for split in ("train", "eval"):
        assert empty[split] == {"whole": 0, "rest": 0, "parts": [[0, 0, 0]]}
