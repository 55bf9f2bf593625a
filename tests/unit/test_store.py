"""Packs from documents to Parquet and back to the batches of a rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds.data.batch import Batch, collate, cut, read
from raytune_ds.data.labels import Label
from raytune_ds.data.order import Order, Place
from raytune_ds.data.share import Share, fetch_rows, fetch_step, packs_of_row
from raytune_ds.data.store import (
    PACK_SCHEMA,
    ROW_GROUP,
    Manifest,
    Split,
    Store,
    doc_id,
    file_and_row,
    pack_documents,
    read_table,
    write_tables,
)
from tests.stores import DOCUMENTS, write_table

Packs = list[dict[str, list[int]]]


def documents(ids: list[list[int]], weights: list[list[float]] | None = None) -> pa.Table:
    """Documents of these tokens, the labels all there are in turn."""
    weights = weights or [[1.0] * len(row) for row in ids]
    labels = [number % len(Label) for number in range(len(ids))]
    return pa.table(
        {"ids": ids, "weights": weights, "doc": range(len(ids)), "label": labels}, schema=DOCUMENTS
    )


def random_packs(count: int) -> pa.Table:
    """`count` packs of one to three documents; every token in the table is another number."""
    rng = np.random.default_rng(count)
    lengths = rng.integers(2, 9, 3 * count)
    ends = np.cumsum(lengths)
    ids = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    # Each document has a supervised target at least, as in a real store.
    weights = [[0.0, 1.0, *rng.integers(0, 2, length - 2).astype(float).tolist()] for length in lengths]
    sizes = rng.integers(1, 4, count)
    members = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    return pack_documents([m.tolist() for m in members], documents(ids, weights))


@pytest.fixture(scope="module")
def packs() -> pa.Table:
    return random_packs(3 * ROW_GROUP + 17)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, packs: pa.Table) -> Store:
    """Three shards: of two row groups, of one, and of a short one."""
    path = tmp_path_factory.mktemp("store")
    shards, start = [], 0
    for number, size in enumerate((2 * ROW_GROUP, ROW_GROUP, 17)):
        name = f"train-{number:06d}.parquet"
        write_table(packs.slice(start, size), f"{path}/{name}")
        shards.append((name, size))
        start += size
    split = Split(shards=tuple(shards), num_packs=start, num_docs=5, num_tokens=6, num_supervised=7)
    return Store(str(path), manifest(split))


def manifest(train: Split) -> Manifest:
    return Manifest(
        fingerprint="0123",
        seq_len=24,
        train=train,
        eval=Split(),
        files=("医.jsonl", "b.jsonl"),
        formats={"b.jsonl": "text"},
        tokenizer="tiny",
        num_rows=3,
        num_rejected=1,
        rejected_reasons={"empty": 1},
        num_truncated=0,
        num_dropped_long=0,
        length_histogram={"8": 2},
    )


def row(table: pa.Table, index: int) -> dict[str, list[float]]:
    return table.slice(index, 1).to_pylist()[0]


def plain(pack: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in pack.items()}


# ---- documents to packs ---------------------------------------------------------------------------


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    table = pack_documents(
        [[1, 0], [2]], documents([[1, 2, 3], [10, 11], [20, 21, 22, 23]], [[9, 0, 1], [9, 0.5], [9, 1, 0, 1]])
    )
    assert table.schema == PACK_SCHEMA
    assert table.to_pylist() == [
        {
            "ids": [10, 1, 2],
            "targets": [11, 2, 3],
            "weights": [0.5, 0, 1],
            "lengths": [1, 2],
            "docs": [1, 0],
            "labels": [1, 0],
        },
        {
            "ids": [20, 21, 22],
            "targets": [21, 22, 23],
            "weights": [1, 0, 1],
            "lengths": [3],
            "docs": [2],
            "labels": [2],
        },
    ]


def test_packs_of_a_slice_and_of_several_chunks_are_the_same() -> None:
    whole = documents([[1, 2, 3], [10, 11], [20, 21, 22, 23], [30, 31]])
    expected = pack_documents([[1], [0, 2]], documents([[10, 11], [20, 21, 22, 23], [30, 31]])).drop(
        ["docs", "labels"]
    )
    assert pack_documents([[1], [0, 2]], whole.slice(1)).drop(["docs", "labels"]).equals(expected)
    chunks = pa.concat_tables([whole.slice(1, 1), whole.slice(2)])
    assert pack_documents([[1], [0, 2]], chunks).drop(["docs", "labels"]).equals(expected)


@given(st.integers(0, 2**23 - 1), st.integers(0, 2**40 - 1))
def test_a_document_id_knows_its_file_and_row(file: int, index: int) -> None:
    identity = doc_id(file, index)
    assert file_and_row(identity) == (file, index)
    assert identity < 2**63  # it is stored as an int64


# ---- Parquet --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 80), max_size=6))
def test_all_row_groups_are_whole_but_the_last(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    schema = pa.schema({"n": pa.int64()})
    ends = np.cumsum(sizes).tolist()
    tables = [pa.table({"n": range(end - size, end)}, schema) for end, size in zip(ends, sizes, strict=True)]
    path = f"{tmp_path_factory.mktemp('groups')}/new/folder/x.parquet"
    write_tables(tables, path, schema)
    file, total = pq.ParquetFile(path), sum(sizes)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [ROW_GROUP] * (total // ROW_GROUP) + [total % ROW_GROUP] * bool(total % ROW_GROUP)
    assert read_table(path).column("n").to_pylist() == list(range(total))


def test_every_pack_is_found_over_several_shards(store: Store, packs: pa.Table) -> None:
    reader = store.reader("train")
    for index in np.random.default_rng(0).permutation(packs.num_rows).tolist():
        assert plain(reader.pack(Place(*divmod(index, ROW_GROUP)))) == row(packs, index)


def test_a_step_reads_the_packs_of_its_slots(store: Store, packs: pa.Table) -> None:
    order = store.order("train", global_batch=4, seed=None)
    read_packs = store.reader("train").step(order, 2, range(1, 4, 2))
    piece = packs.num_rows / 4
    assert [plain(p) for p in read_packs] == [row(packs, int(slot * piece) + 2) for slot in (1, 3)]


def test_a_manifest_survives_being_written(tmp_path: Path) -> None:
    made = manifest(Split(shards=(("a.parquet", 3), ("b.parquet", 1)), num_packs=4))
    assert Manifest.from_json(made.to_json()) == made
    assert Store.find(str(tmp_path)) is None  # no manifest, no store
    (tmp_path / "manifest.json").write_text(made.to_json(), encoding="utf-8")
    assert Store.find(str(tmp_path)) == Store(str(tmp_path), made)


# ---- batches --------------------------------------------------------------------------------------


def test_collate_restarts_positions_at_every_document(packs: pa.Table) -> None:
    pair = [
        {"ids": [5, 6, 7], "targets": [6, 7, 8], "weights": [0, 1, 0.5], "lengths": [2, 1], "labels": [1, 2]}
        | {"docs": [8, 8]},
        {"ids": [1, 2, 3, 4], "targets": [2, 3, 4, 5], "weights": [1, 1, 0, 0], "lengths": [4], "docs": [9]},
    ]
    batch = collate([{name: np.array(values) for name, values in pack.items()} for pack in pair])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 1, 2, 3, 4]]
    assert batch.targets_BT.tolist() == [[6, 7, 8, 2, 3, 4, 5]]
    assert batch.weights_BT.tolist() == [[0, 1, 0.5, 1, 1, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 0, 1, 2, 3]]
    assert batch.segments.tolist() == [0, 2, 3, 7]
    assert batch.labels_S.tolist() == [Label.CHOSEN, Label.REJECTED, Label.PLAIN]
    assert batch.docs_S.tolist() == [8, 8, 9]
    assert batch.supervised_N.tolist() == [1, 2, 3, 4]
    assert batch.targets_N.tolist() == [7, 8, 2, 3]
    assert batch.weights_N.tolist() == [1, 0.5, 1, 1]
    assert batch.segment_of_target_N.tolist() == [0, 1, 2, 2]
    assert batch.weights_S.tolist() == [1, 0.5, 2]
    assert (batch.max_segment, batch.num_tokens, float(batch.weight)) == (4, 7, 3.5)
    types = (batch.ids_BT.dtype, batch.targets_BT.dtype, batch.positions_BT.dtype, batch.segments.dtype)
    assert types == (torch.int64, torch.int64, torch.int64, torch.int32)


def test_a_weight_is_summed_exactly() -> None:
    # In float32 the sum of so many ones and one tenth would round.
    count = 2**24 + 1
    ones = torch.ones(1, 1).expand(1, count)
    empty = collate([])
    assert float(replace(empty, weights_BT=ones).weight) == count


def test_no_pack_is_a_batch_of_weight_zero() -> None:
    batch = collate([])
    assert (float(batch.weight), batch.num_tokens, batch.segments.tolist(), batch.max_segment) == (
        0,
        1,
        [0, 1],
        1,
    )
    assert batch.positions_BT.shape == batch.weights_BT.shape == (1, 1)
    assert batch.labels_S.tolist() == [Label.PLAIN]


# ---- a rank's share -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_rank_has_as_many_micro_batches(data: st.DataObject) -> None:
    global_batch = data.draw(st.integers(1, 20))
    world_size = data.draw(st.integers(1, global_batch))
    micro_batch = data.draw(st.integers(1, 20))
    order = Order(100, 8, global_batch, 0)
    cuts = [list(Share(order, rank, world_size, micro_batch).micro_batches()) for rank in range(world_size)]
    assert {len(parts) for parts in cuts} == {-(-len(order.slots(0, world_size)) // micro_batch)}
    assert all(len(part) <= micro_batch for parts in cuts for part in parts)
    assert sorted(slot for parts in cuts for part in parts for slot in part) == list(range(global_batch))


@pytest.mark.parametrize("world_size", [1, 3])
def test_fetched_rows_are_the_packs_themselves(store: Store, world_size: int) -> None:
    order = store.order("train", global_batch=10, seed=1)
    steps = (
        order.steps_per_epoch + 2
    )  # over the partial batch, in which rank 2 of 3 has some slots without a pack
    for rank in range(world_size):
        share = Share(order, rank, world_size, micro_batch=2)
        task = {"first": np.array([1]), "last": np.array([steps])}
        rows = list(fetch_rows(task, store, "train", share))
        assert len(rows) == steps - 1
        for step, table in enumerate(rows, start=1):
            expected = fetch_step(store.reader("train"), share, step)
            fetched = packs_of_row(table)
            assert list(fetched) == list(expected)
            assert {s: plain(p) for s, p in fetched.items()} == {s: plain(p) for s, p in expected.items()}


def test_a_rank_without_a_pack_still_takes_part(tmp_path: Path) -> None:
    write_table(random_packs(3), f"{tmp_path}/only.parquet")
    store = Store(str(tmp_path), manifest(Split(shards=(("only.parquet", 3),), num_packs=3)))
    order = store.order("train", global_batch=4, seed=0)
    weights = []
    for rank in range(4):
        share = Share(order, rank, 4, micro_batch=1)
        (table,) = fetch_rows({"first": np.array([0]), "last": np.array([1])}, store, "train", share)
        (batch,) = cut(share, packs_of_row(table))
        weights.append(float(batch.weight) if order.place(0, rank) else None)
        if weights[-1] is None:
            assert (float(batch.weight), batch.num_tokens) == (0, 1)
    assert weights.count(None) == 1


def tokens_of(batches: list[Batch]) -> list[int]:
    return sorted(int(i) for b in batches if b.weight != 0 for i in b.ids_BT.flatten())


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 10), (2, 3), (3, 1), (7, 2), (10, 1)])
def test_a_global_step_is_the_same_however_it_is_cut(store: Store, world_size: int, micro_batch: int) -> None:
    order = store.order("train", global_batch=10, seed=5)
    steps = range(order.steps_per_epoch)
    whole = [tokens_of(step) for step in read(store, "train", Share(order, 0, 1, 10), steps)]
    ranks = [
        list(read(store, "train", Share(order, rank, world_size, micro_batch), steps))
        for rank in range(world_size)
    ]
    for step in steps:
        batches = [batch for rank in ranks for batch in rank[step]]
        weight = sum(float(batch.weight) for batch in batches)
        assert tokens_of(batches) == whole[step]
        assert weight > 0
