"""A batch's fingerprint: the same however the batch is cut, another one for any other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds import loop
from raytune_ds.data import batchid
from raytune_ds.data.batch import Batch, collate, cut, read
from raytune_ds.data.share import Share, fetch_step
from raytune_ds.data.store import Store
from raytune_ds.world import World
from tests.ranks import on_ranks
from tests.stores import store_of
from tests.unit.test_loop import StillEngine

DOCS = [[7], [8, 9], [1, 2, 3], [4], [5, 6], [10, 11]]


def hashed(packs: list[list[int]]) -> int:
    return batchid.total({slot: batchid.pack_hash(np.array(docs)) for slot, docs in enumerate(packs)})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of 45 packs, so that with 8 a step the last one of an epoch has 5."""
    return store_of(tmp_path_factory.mktemp("store"), 45)


def batch_of(store: Store, step: int, world_size: int, micro_batch: int) -> str:
    """What the rows of metrics.jsonl say of a step in such a world; the same on each rank."""
    order = store.order("train", global_batch=8, seed=3)
    shares = [Share(order, rank, world_size, micro_batch) for rank in range(world_size)]
    # Not by the threads that play ranks: they would share a Parquet file, as processes never do.
    batches = [next(read(store, "train", share, range(step, step + 1))) for share in shares]

    def trained(world: World) -> dict[str, Any]:
        engine: Any = StillEngine()
        return loop.optimizer_step(engine, no_loss, batches[world.rank], world, lr=1.0)

    rows = on_ranks(world_size, trained)
    (batch,) = {row["batch"] for row in rows}
    return str(batch)


def no_loss(module: Any, batch: Batch) -> torch.Tensor:
    return torch.zeros(())


@pytest.mark.parametrize("step", [0, 3, 5, 6])
def test_it_does_not_depend_on_workers_and_micro_batches(store: Store, step: int) -> None:
    order = store.order("train", global_batch=8, seed=3)
    alone = fetch_step(store.reader("train"), Share(order, 0, 1, 8), step)
    expected = batchid.text(batchid.total({s: batchid.pack_hash(p["docs"]) for s, p in alone.items()}))
    assert len(expected) == 16
    for world_size in (1, 2, 3, 5):
        for micro_batch in (1, 2, 8):
            assert batch_of(store, step, world_size, micro_batch) == expected


def test_no_two_steps_of_a_run_have_the_same(store: Store) -> None:
    batches = [batch_of(store, step, 1, 8) for step in range(24)]
    assert len(set(batches)) == 24


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_two_rows_that_change_places_change_it(data: st.DataObject) -> None:
    places = [(pack, index) for pack, docs in enumerate(DOCS) for index in range(len(docs))]
    one, other = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True))
    swapped = [list(docs) for docs in DOCS]
    swapped[one[0]][one[1]], swapped[other[0]][other[1]] = DOCS[other[0]][other[1]], DOCS[one[0]][one[1]]
    assert hashed(swapped) != hashed(DOCS)


def test_any_row_that_is_another_missing_or_doubled_changes_it() -> None:
    for slot, docs in enumerate(DOCS):
        for changed in ([docs[0] + 1, *docs[1:]], docs[1:], [*docs, docs[0]]):
            assert hashed([*DOCS[:slot], changed, *DOCS[slot + 1 :]]) != hashed(DOCS)
    assert hashed(DOCS[:-1]) != hashed(DOCS)
    assert hashed(DOCS[1:]) != hashed(DOCS)


def test_rows_of_one_pack_are_not_mistaken_for_rows_of_two() -> None:
    assert hashed([[1, 2], [3]]) != hashed([[1], [2, 3]])


def test_a_slot_without_a_pack_adds_nothing() -> None:
    assert batchid.text(batchid.total({})) == "0" * 16
    assert collate([]).rows == 0


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_ranks_add_their_parts_up_in_float64_without_rounding(parts: list[int]) -> None:
    high, low = (sum(map(float, half)) for half in zip(*map(batchid.halves, parts), strict=True))
    assert batchid.joined(high, low) == sum(parts) % 2**64


def test_thousands_of_ranks_do_not_round() -> None:
    high, low = batchid.halves(2**64 - 1)
    assert batchid.joined(8192.0 * high, 8192.0 * low) == 8192 * (2**64 - 1) % 2**64


def test_it_never_changes() -> None:
    # metrics.jsonl is read years later.
    assert batchid.text(hashed(DOCS)) == GOLDEN


GOLDEN = "0cbed92efcb222d1"


def test_it_follows_a_batch_to_its_device(store: Store) -> None:
    share = Share(store.order("train", 8, 0), 0, 1, 4)
    for batch in cut(share, fetch_step(store.reader("train"), share, 0)):
        assert batch.rows == batch.to(torch.device("cpu")).rows != 0
