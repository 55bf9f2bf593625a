"""Pairs of answers on their way into the store: together, in order, and both with something to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds.data.buckets import _pack_units, pack_bucket
from raytune_ds.data.chunks import DOCUMENT_SCHEMA
from raytune_ds.data.fit import fit
from raytune_ds.data.formats import RowError
from raytune_ds.data.job import Job, Tally
from raytune_ds.data.labels import Label, units
from raytune_ds.data.store import pack_documents, read_table
from raytune_ds.data.template import Encoded
from tests.helpers import write_jsonl
from tests.unit.test_scatter import encode, job_of

SEQ_LEN = 12
NOTHING: Any = None
JOB = Job((), (), NOTHING, SEQ_LEN, "truncate", False, "auto", 0, 1, 1, "", "")

SINGLE = st.tuples(st.just("single"), st.integers(1, SEQ_LEN), st.sampled_from([0, 3, 4]))
PAIR = st.tuples(st.just("pair"), st.integers(1, SEQ_LEN - 1), st.integers(1, SEQ_LEN - 1)).filter(
    lambda unit: unit[1] + unit[2] <= SEQ_LEN
)


def documents(rows: list[tuple[Any, ...]]) -> pa.Table:
    """A pair or a single document a row; every token is the number of its document."""
    columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_SCHEMA.names}
    for doc, (kind, one, other) in enumerate(rows):
        answers = [(one, Label.CHOSEN), (other, Label.REJECTED)] if kind == "pair" else [(one, other)]
        for piece, (length, label) in enumerate(answers):
            number = len(columns["ids"])
            values = (doc, 1, piece, doc, [number] * (length + 1), [1.0] * (length + 1), label)
            for name, value in zip(DOCUMENT_SCHEMA.names, values, strict=True):
                columns[name].append(value)
    return pa.table(columns, schema=DOCUMENT_SCHEMA)


# ---- packing --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(SINGLE | PAIR, min_size=1, max_size=30))
def test_a_pair_is_never_separated(rows: list[tuple[Any, ...]]) -> None:
    table = documents(rows)
    members = _pack_units(table, np.arange(table.num_rows), SEQ_LEN)
    assert sorted(row for pack in members for row in pack) == list(range(table.num_rows))
    seen = 0
    for pack in pack_documents(members, table).to_pylist():
        assert len(pack["ids"]) == sum(pack["lengths"]) <= SEQ_LEN
        labels = pack["labels"]
        for position, label in enumerate(labels):
            if label == Label.CHOSEN:
                seen += 1
                assert labels[position + 1] == Label.REJECTED
                assert pack["docs"][position] == pack["docs"][position + 1]
    assert seen == sum(kind == "pair" for kind, *_ in rows)


def test_a_pair_is_as_long_as_both_its_answers() -> None:
    rows = [("pair", 4, 4), ("pair", 4, 3), ("single", 5, Label.PLAIN), ("single", 4, Label.PLAIN)]
    assert _pack_units(documents(rows), np.arange(6), 12) == [[0, 1, 5], [2, 3, 4]]


@pytest.mark.parametrize(
    ("docs", "labels"),
    [
        ([0], [Label.CHOSEN]),
        ([0], [Label.REJECTED]),
        ([0, 0], [Label.REJECTED, Label.CHOSEN]),
        ([0, 1], [Label.CHOSEN, Label.REJECTED]),
        ([0, 1, 0], [Label.CHOSEN, Label.PLAIN, Label.REJECTED]),
        ([0, 0, 0], [Label.CHOSEN, Label.REJECTED, Label.REJECTED]),
        ([0, 0, 0], [Label.CHOSEN, Label.CHOSEN, Label.REJECTED]),
    ],
)
def test_half_a_pair_is_found(docs: list[int], labels: list[Label]) -> None:
    with pytest.raises(ValueError, match="not followed by the rejected one"):
        units(np.array(docs), np.array(labels))


def test_units_of_one_row_are_told_apart() -> None:
    labels = [Label.PLAIN, Label.PLAIN, Label.CHOSEN, Label.REJECTED, Label.DESIRABLE]
    assert units(np.array([7, 7, 7, 7, 7]), np.array(labels)).tolist() == [0, 1, 2, 4, 5]
    assert units(np.array([], int), np.array([], int)).tolist() == [0]


# ---- pairs that are too long ----------------------------------------------------------------------


def side(context: int, answer: int, label: Label, token: int) -> Encoded:
    """Its context is the same as any other's, its answer is all `token`."""
    return Encoded([0] * context + [token] * answer, [0.0] * context + [1.0] * answer, label)


def pair_of(context: int, chosen: int, rejected: int) -> list[Encoded]:
    return [side(context, chosen, Label.CHOSEN, 1), side(context, rejected, Label.REJECTED, 2)]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10), st.integers(1, 20), st.integers(1, 20))
def test_a_pair_is_cut_to_what_fits_or_dropped_as_one(context: int, chosen: int, rejected: int) -> None:
    given_pair, tally = pair_of(context, chosen, rejected), Tally()
    lengths = [len(side.ids) - 1 for side in given_pair]
    fitting = fit(given_pair, JOB, tally, raw_text=False)
    assert (tally.num_truncated, tally.num_dropped_long, bool(fitting)) in {
        (0, 0, True),
        (1, 0, True),
        (0, 1, False),
    }
    if sum(lengths) <= SEQ_LEN:
        assert fitting == given_pair
        assert tally.num_truncated == 0
    elif fitting:
        assert tally.num_truncated == 1
        kept = [len(side.ids) - 1 for side in fitting]
        assert sum(kept) == SEQ_LEN  # no room is left unused
        for part, whole, own, length in zip(fitting, given_pair, kept, lengths, strict=True):
            assert part == whole.part(0, own + 1)
            assert part.num_supervised > 0
            assert own >= min(length, SEQ_LEN // 2)  # who needs less than half keeps all
    else:
        assert (
            context > SEQ_LEN // 2 or min(context + chosen, context + rejected) <= SEQ_LEN // 2 < context + 1
        )
    dropped = fit(given_pair, replace(JOB, on_long_row="drop"), Tally(), raw_text=False)
    assert dropped == (given_pair if sum(lengths) <= SEQ_LEN else [])


def test_answers_that_are_alike_once_cut_are_dropped() -> None:
    pair = [
        Encoded([0, *[1] * 20, end], [0.0] + [1.0] * 21, label)
        for end, label in ((2, Label.CHOSEN), (3, Label.REJECTED))
    ]
    tally = Tally()
    assert fit(pair, JOB, tally, raw_text=False) == []
    assert (tally.num_truncated, tally.num_dropped_long) == (0, 1)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_pair_with_an_answer_of_nothing_is_a_bad_row(empty: int) -> None:
    pair = pair_of(2, 3, 3)
    pair[empty].weights = [0.0] * len(pair[empty].ids)
    with pytest.raises(RowError, match="nothing in one of its answers is trained on"):
        fit(pair, JOB, Tally(), raw_text=False)


def test_a_labelled_answer_that_is_cut_keeps_its_label() -> None:
    (cut,) = fit([side(2, 30, Label.UNDESIRABLE, 1)], JOB, Tally(), raw_text=False)
    assert (len(cut.ids), cut.label) == (SEQ_LEN + 1, Label.UNDESIRABLE)


# ---- from rows to packs ---------------------------------------------------------------------------


def test_rows_of_pairs_become_packs_of_pairs(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"{i}" * (i % 7 + 1), "rejected": "no"} for i in range(40)]
    data = write_jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    job = job_of(data, tiny_models["qwen2"], "drop", seq_len=64)
    tally, table = encode(job)
    assert [row["reason"].split(":")[0] for row in tally.rejected] == ["'chosen' and 'rejected' are the same"]
    assert table.column("label").to_pylist() == [Label.CHOSEN, Label.REJECTED] * 40
    packed = pack_bucket(0, job, thresholds=(0,), quotas={})
    assert packed["num_docs"] == packed["train"]["parts"][0][0] == tally.num_docs == 80
    packs = read_table(f"{job.scratch}/rest-train-000000.parquet").to_pylist()
    labels = [pack["labels"] for pack in packs]
    assert labels == [[Label.CHOSEN, Label.REJECTED] * (len(of_pack) // 2) for of_pack in labels]
    docs = [pack["docs"][i : i + 2] for pack in packs for i in range(0, len(pack["docs"]), 2)]
    assert all(one == other for one, other in docs)
    assert sorted(doc for doc, _ in docs) == list(range(40))


def test_labels_of_rows_are_in_the_packs(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    data = write_jsonl(
        tmp_path / "kto.jsonl",
        [{"prompt": "q", "completion": f"a{i}", "label": i % 3 == 0} for i in range(9)],
    )
    _, table = encode(job_of(data, tiny_models["qwen2"], "drop", seq_len=64))
    expected = [Label.UNDESIRABLE if i % 3 else Label.DESIRABLE for i in range(9)]
    assert table.column("label").to_pylist() == expected
