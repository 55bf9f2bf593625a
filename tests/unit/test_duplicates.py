"""Rows that are like others, found by their marks, as somebody would who looked at each pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raytune_ds.data import duplicates
from raytune_ds.data.chunks import MARK_SCHEMA
from raytune_ds.data.duplicates import KINDS, Doubles
from raytune_ds.data.sketch import ALIKE, MINIMA

JOB: Any = SimpleNamespace(sources_of=lambda docs: np.zeros(len(docs), np.int64))
THRESHOLD = 100
BANDS = 3


def marks_of(chance: np.random.Generator, num_docs: int) -> pa.Table:
    """Of rows many of which share marks, with sketches that agree often; about a third is held out."""
    rows = []
    for doc in chance.permutation(num_docs).tolist():
        eval_key = int(chance.integers(THRESHOLD - 33, THRESHOLD + 67))
        sketch = np.where(
            chance.random(MINIMA) < chance.choice([0.8, 0.95]), 0, chance.integers(0, 256, MINIMA)
        ).astype(np.uint8)
        for band in range(-1, BANDS):
            value = int(chance.integers(8 if band >= 0 else 150)) + 1000 * abs(band)
            rows.append(
                {
                    "mark": value,
                    "exact": band < 0,
                    "doc": doc,
                    "eval_key": eval_key,
                    "sketch": sketch.tobytes(),
                }
            )
    return pa.Table.from_pylist(rows, schema=MARK_SCHEMA)


def looked_at(marks: pa.Table) -> dict[str, dict[int, int]]:
    """By kind, each row with the first one that it is like."""
    rows = sorted(marks.to_pylist(), key=lambda row: row["doc"])
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["exact"], row["mark"]), []).append(row)
    found: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    for (exact, _), group in groups.items():
        lead = next((row for row in group if row["eval_key"] > THRESHOLD), None)
        for row in group if lead else ():
            agree = np.mean([a == b for a, b in zip(row["sketch"], lead["sketch"], strict=True)])
            if row is not lead and (exact or agree >= ALIKE):
                held_out = row["eval_key"] <= THRESHOLD
                kind = KINDS[2 * (not exact) + held_out]
                found[kind][row["doc"]] = min(lead["doc"], found[kind].get(row["doc"], lead["doc"]))
    for near, exact in (("near-duplicates", "duplicates"), ("nearly-leaked", "leaked")):
        found[near] = {doc: other for doc, other in found[near].items() if doc not in found[exact]}
    return found


def found_in(marks: pa.Table) -> dict[str, Any]:
    order = np.lexsort([marks.column(name).to_numpy() for name in ("doc", "mark", "exact")])
    return duplicates._found_in(marks, order, JOB, (THRESHOLD,))


@pytest.mark.parametrize("at_once", [7, 1 << 14])
@pytest.mark.parametrize("seed", range(5))
def test_as_one_who_looks_at_each(monkeypatch: pytest.MonkeyPatch, seed: int, at_once: int) -> None:
    monkeypatch.setattr(duplicates, "_AT_ONCE", at_once)
    marks = marks_of(np.random.default_rng(seed), 120)
    doubles, expected = Doubles.of([found_in(marks)]), looked_at(marks)
    for kind in KINDS:
        assert dict(doubles.found(kind).tolist()) == expected[kind]
        assert len(expected[kind]) > 0
    assert doubles.trained + doubles.held_out == 120


@pytest.mark.parametrize("few", [0, 50, 1 << 16])
def test_a_row_that_is_in_several_buckets_counts_once(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Whatever the order of the buckets, with the first of the rows that it is like."""
    monkeypatch.setattr(duplicates, "_FEW", few)
    told = [found_in(marks_of(np.random.default_rng(seed), 60)) for seed in range(6)]
    expected: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    for bucket, kind in ((bucket, kind) for bucket in told for kind in KINDS):
        for doc, other in bucket["pairs"][kind].tolist():
            expected[kind][doc] = min(other, expected[kind].get(doc, other))
    for buckets in (told, told[::-1]):
        doubles = Doubles.of(buckets)
        for kind, other_kind in zip(KINDS, (None, None, *KINDS), strict=False):
            exact = expected[other_kind] if other_kind else {}
            assert dict(doubles.found(kind).tolist()) == {
                doc: other for doc, other in expected[kind].items() if doc not in exact
            }
    assert doubles.trained == sum(bucket["trained"] for bucket in told)


def test_no_rows() -> None:
    empty = MARK_SCHEMA.empty_table()
    doubles = Doubles.of([found_in(empty), found_in(empty)])
    assert [len(doubles.found(kind)) for kind in KINDS] == [0, 0, 0, 0]
    assert all(len(Doubles.of([]).found(kind)) == 0 for kind in KINDS)
