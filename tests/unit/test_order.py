"""Which pack each slot reads: every pack once an epoch, the same rows a step for any number of workers."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds.data.order import Order, Permutation, Place

orders = st.builds(
    Order,
    num_packs=st.integers(1, 300),
    row_group_size=st.integers(1, 40),
    global_batch=st.integers(1, 24),
    seed=st.none() | st.integers(0, 2**32 - 1),
)


def epoch(order: Order, number: int) -> list[list[Place | None]]:
    """What each slot reads at each step of an epoch."""
    first = number * order.steps_per_epoch
    return [
        [order.place(step, slot) for slot in range(order.global_batch)]
        for step in range(first, first + order.steps_per_epoch)
    ]


def all_places(order: Order) -> list[Place]:
    return [Place(*divmod(i, order.row_group_size)) for i in range(order.num_packs)]


@settings(max_examples=200, deadline=None)
@given(orders, st.integers(0, 3))
def test_every_pack_is_read_exactly_once_an_epoch(order: Order, number: int) -> None:
    read = [place for step in epoch(order, number) for place in step if place is not None]
    assert sorted(read, key=lambda p: (p.row_group, p.row)) == all_places(order)


@settings(max_examples=100, deadline=None)
@given(orders)
def test_only_the_last_batch_of_an_epoch_is_partial(order: Order) -> None:
    steps = epoch(order, 0)
    assert len(steps) == -(-order.num_packs // order.global_batch)
    assert all(place is not None for step in steps[:-1] for place in step)
    left = order.num_packs - (len(steps) - 1) * order.global_batch
    assert sum(place is not None for place in steps[-1]) == left > 0


@settings(max_examples=100, deadline=None)
@given(orders)
def test_every_slot_has_exactly_one_owner_in_any_world(order: Order) -> None:
    for world_size in range(1, order.global_batch + 1):
        owned = [list(order.slots(rank, world_size)) for rank in range(world_size)]
        assert sorted(slot for slots in owned for slot in slots) == list(range(order.global_batch))
        sizes = [len(slots) for slots in owned]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)  # what `Share.micro_batches` counts with


@pytest.mark.parametrize("world_size", range(1, 13))
def test_the_rows_of_a_global_step_do_not_depend_on_the_world(world_size: int) -> None:
    order = Order(num_packs=101, row_group_size=8, global_batch=12, seed=3)
    for step in range(2 * order.steps_per_epoch):
        alone = {order.place(step, slot) for slot in range(12)}
        together = [order.place(step, s) for rank in range(world_size) for s in order.slots(rank, world_size)]
        assert set(together) == alone


@settings(max_examples=60, deadline=None)
@given(orders)
def test_a_slot_reads_its_row_groups_one_after_the_other(order: Order) -> None:
    steps = epoch(order, 1)
    for slot in range(order.global_batch):
        groups = [place.row_group for step in steps if (place := step[slot]) is not None]
        runs = [group for group, _ in groupby(groups)]
        assert len(runs) == len(set(runs))


def test_epochs_and_seeds_differ() -> None:
    def rows(seed: int, number: int) -> list[list[Place | None]]:
        return epoch(Order(num_packs=96, row_group_size=8, global_batch=4, seed=seed), number)

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1)
    assert rows(0, 0) != rows(1, 0)
    groups = [[place.row_group for step in rows(0, e) for place in step if place] for e in (0, 1)]
    assert groups[0] != groups[1]


def test_rows_within_a_group_are_shuffled_too() -> None:
    order = Order(num_packs=32, row_group_size=32, global_batch=1, seed=0)
    rows = [place.row for (place,) in epoch(order, 0) if place]
    assert sorted(rows) == list(range(32)) != rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2))
def test_without_a_seed_it_is_the_order_of_the_store(packs: int, row_group: int, number: int) -> None:
    order = Order(packs, row_group, global_batch=1, seed=None)
    assert [place for (place,) in epoch(order, number)] == all_places(order)


def test_steps_go_on_over_epochs() -> None:
    order = Order(num_packs=10, row_group_size=4, global_batch=4, seed=0)
    assert [order.epoch_and_step(step) for step in range(7)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0),
    ]  # fmt: skip


def test_the_order_never_changes() -> None:
    # Checkpoints hold a step and nothing else of the order: with another order a resumed run would read some packs
    # twice and others never.
    order = Order(num_packs=10, row_group_size=4, global_batch=3, seed=7)
    flat = [p and (p.row_group, p.row) for step in epoch(order, 1) for p in step]
    assert flat == GOLDEN


GOLDEN = [(1, 0), (1, 3), (0, 0), (1, 2), (2, 0), (0, 1), (1, 1), (2, 1), (0, 3), None, None, (0, 2)]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 600), st.text(max_size=8))
def test_a_permutation_is_one_and_knows_its_way_back(size: int, key: str) -> None:
    permutation = Permutation(size, key)
    images = [permutation(i) for i in range(size)]
    assert sorted(images) == list(range(size))
    assert [permutation.inverse(image) for image in images] == list(range(size))


def test_a_permutation_of_many_needs_no_table() -> None:
    permutation = Permutation(10**12 + 39, "key")
    for index in (0, 1, 12345, 10**12):
        assert permutation.inverse(permutation(index)) == index


@pytest.mark.parametrize("size", [3, 5, 16, 32])
def test_permutations_are_even(size: int) -> None:
    # Over many keys every index goes everywhere about equally often: chi-square, a degree of freedom is worth 1.
    num_keys = 4000
    counts = [[0] * size for _ in range(size)]
    for key in range(num_keys):
        permutation = Permutation(size, str(key))
        for index in range(size):
            counts[index][permutation(index)] += 1
    expected = num_keys / size
    chi_square = sum((count - expected) ** 2 / expected for row in counts for count in row)
    assert chi_square < 2.5 * (size - 1) ** 2
