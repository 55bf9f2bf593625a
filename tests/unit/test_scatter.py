"""Rows on their way into the store, a block of them and without Ray: of raw text every token is a target once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytune_ds.config import DataConfig
from raytune_ds.data import scatter
from raytune_ds.data.chunks import bucket_documents, finished
from raytune_ds.data.formats import Example
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.job import Job, Tally
from raytune_ds.data.scatter import encode_chunks, read_chunks
from raytune_ds.data.template import Encoder
from raytune_ds.data.thinking import KEPT, NONE
from raytune_ds.data.tokenizer import TokenizerSpec
from tests.helpers import write_jsonl

SEQ_LEN = 8


def job_of(data: Path, model: Path, on_long_row: str, seq_len: int = SEQ_LEN) -> Job:
    """Of one file and one bucket."""
    found = Inputs.find(DataConfig.model_validate({"sources": str(data)}))
    return Job(
        inputs=found.items,
        sources=found.sources,
        tokenizer=TokenizerSpec(str(model)),
        seq_len=seq_len,
        on_long_row=on_long_row,
        last_turn_only=False,
        thinking="auto",
        seed=0,
        num_buckets=1,
        chunk_chars=1 << 20,
        scratch=str(data.parent / f"scratch-{on_long_row}"),
        target="",
    )


def encode(job: Job) -> tuple[Tally, pa.Table]:
    """All rows through one task: what became of them, and the sequences in order."""
    (task,) = read_chunks([0], job, frozenset(), 1 << 20)
    ((_, tally),) = encode_chunks(task, job)
    documents = bucket_documents(job, 0).sort_by([("doc", "ascending"), ("piece", "ascending")])
    return tally, documents


@pytest.mark.parametrize("on_long_row", ["truncate", "drop"])
def test_every_token_of_a_text_is_a_target_once(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, on_long_row: str
) -> None:
    """The pieces of a text, one token over the other, are the text again; whatever becomes of long conversations."""
    texts = ["word" + " 1" * count for count in range(3 * SEQ_LEN)]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    tally, table = encode(job_of(data, tiny_models["qwen2"], on_long_row))
    whole = [Encoder(tiny_tokenizer).encode(Example(text=text))[0].ids for text in texts]
    joined: dict[int, list[int]] = {}
    for piece in table.to_pylist():
        assert piece["weights"] == [1.0] * len(piece["ids"])
        assert 2 <= len(piece["ids"]) <= SEQ_LEN + 1
        before = joined.setdefault(piece["doc"], piece["ids"][:1])
        assert (
            before[-1] == piece["ids"][0]
        )  # the token that the piece before it ends with is what it begins with
        before += piece["ids"][1:]
    assert list(joined.values()) == whole
    long = sum(len(ids) > SEQ_LEN + 1 for ids in whole)
    assert 0 < long < len(texts)
    assert (tally.num_split, tally.num_truncated, tally.num_dropped_long) == (long, 0, 0)
    assert (tally.num_docs, tally.rejected) == (table.num_rows, [])


def test_split_texts_are_counted_over_all_blocks() -> None:
    total = Tally(num_split=2)
    total.add(Tally(num_split=3))
    assert total.num_split == 5


def test_what_became_of_reasoning_is_tallied(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    asked = {"role": "user", "content": "q"}
    contents = ["<think>h</think>a", "b", "c"]
    rows = [{"messages": [asked, {"role": "assistant", "content": content}]} for content in contents]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    tally, _ = encode(job_of(data, tiny_models["deepseek-v3"], "truncate"))
    total = Tally()
    total.add(tally)
    total.add(tally)
    assert total.turns == {KEPT: 2, NONE: 4}


def test_chunks_that_are_done_are_many_to_a_task_and_not_all(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became of their rows is read again, and takes its time as well."""
    monkeypatch.setattr(scatter, "_DONE_AT_ONCE", 4)
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text {number}"} for number in range(10)])
    job = replace(job_of(data, tiny_models["qwen2"], "drop"), chunk_chars=1)
    (task,) = read_chunks([0], job, frozenset(), 1 << 20)
    assert len(task) == 10
    tallies = dict(encode_chunks(task, job))
    again = list(read_chunks([0], job, finished(job), 1 << 20))
    assert [len(of_task) for of_task in again] == [4, 4, 2]
    assert not any(chunk.rows for of_task in again for chunk in of_task)
    assert {name: tally for of_task in again for name, tally in encode_chunks(of_task, job)} == tallies
