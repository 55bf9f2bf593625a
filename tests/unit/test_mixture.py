"""Mixtures are exact: to the row over an epoch, and whatever the buckets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ds.config import SourceConfig
from raytune_ds.data.mixture import Source, named, quotas, shared_out, times_drawn


def sources(*settings: tuple[float | None, float]) -> list[Source]:
    return [Source(i, f"s{i}", f"s{i}", False, weight, epochs) for i, (weight, epochs) in enumerate(settings)]


def test_without_weights_each_source_gives_its_rows_epochs_times() -> None:
    assert quotas(sources((None, 1.0), (None, 2.0), (None, 0.25)), [10, 7, 40]) == [10, 14, 10]


def test_with_weights_the_first_source_that_is_used_up_ends_the_epoch() -> None:
    assert quotas(sources((1.0, 1.0), (3.0, 1.0)), [100, 60]) == [20, 60]
    assert quotas(sources((1.0, 1.0), (3.0, 2.0)), [100, 60]) == [40, 120]
    assert quotas(sources((2.0, 1.0), (6.0, 1.0)), [100, 60]) == [20, 60]  # only their ratio counts


def test_no_source_is_left_out_for_being_small() -> None:
    assert quotas(sources((1.0, 1.0), (1000.0, 1.0)), [100, 60]) == [1, 60]


@given(st.integers(0, 10_000), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_buckets_share_a_quota_in_proportion_and_to_the_row(quota: int, counts: list[int]) -> None:
    parts = shared_out(quota, counts)
    total = sum(counts)
    assert sum(parts) == (quota if total else 0)
    for part, count in zip(parts, counts, strict=True):
        assert abs(part - quota * count / max(1, total)) < 1
        assert part == 0 or count > 0


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30, unique=True), st.integers(0, 100))
def test_rows_come_as_often_as_the_quota_wants_and_none_twice_more_than_another(
    keys: list[int], quota: int
) -> None:
    times = times_drawn(np.array(keys, np.uint64), quota)
    assert times.sum() == (quota if keys else 0)
    if keys:
        assert times.max() - times.min() <= 1
        more = [key for key, count in zip(keys, times, strict=True) if count > times.min()]
        assert more == [] or max(more) <= min(k for k, n in zip(keys, times, strict=True) if n == times.min())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/law.jsonl", "law"),
        ("data/law.jsonl.gz", "law"),
        ("/data/law/*.parquet", "law"),
        ("data/law/", "law"),
        ("s3://bucket/law/**/*.jsonl?region=x", "law"),
        ("org/law", "law"),
        ("*.jsonl", "data"),
        ("法律 数据.json", "法律-数据"),
    ],
)
def test_a_source_is_called_after_its_path(path: str, name: str) -> None:
    (source,) = named([(SourceConfig(path=path), False)])
    assert source.name == name


def test_names_are_told_apart() -> None:
    given_sources = [
        SourceConfig(path=path, name=name) for path, name in (("a/x", None), ("b/x", None), ("c", "x"))
    ]
    found = named([(source, index == 1) for index, source in enumerate(given_sources)])
    assert [source.name for source in found] == ["x-2", "x-3", "x"]
    assert [(source.index, source.held_out) for source in found] == [(0, False), (1, True), (2, False)]
