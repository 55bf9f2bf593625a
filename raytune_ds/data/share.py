"""What one rank reads of every global batch: the work of the tasks that fetch it. No torch here, which takes seconds
to import in every one of their processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds.data.order import Order
from raytune_ds.data.store import PACK_SCHEMA, PackReader, Store


@dataclass(frozen=True)
class Share:
    """What one rank reads of every global batch.

    Attributes:
        order: of the run.
        rank, world_size: whose share it is.
        micro_batch: packs of one forward pass.
    """

    order: Order
    rank: int
    world_size: int
    micro_batch: int

    @property
    def slots(self) -> range:
        """Of this rank."""
        return self.order.slots(self.rank, self.world_size)

    def micro_batches(self) -> Iterator[range]:
        """The slots cut into micro-batches, as many on every rank (sharded engines need that), some perhaps empty."""
        largest_share = len(self.order.slots(0, self.world_size))
        for start in range(0, largest_share, self.micro_batch):
            yield self.slots[start : start + self.micro_batch]


def fetch_step(reader: PackReader, share: Share, step: int) -> dict[int, dict[str, np.ndarray]]:
    """The packs that the share's slots read at a global step, by slot."""
    places = {slot: share.order.place(step, slot) for slot in share.slots}
    return {slot: reader.pack(place) for slot, place in places.items() if place is not None}


def fetch_rows(batch: dict[str, np.ndarray], store: Store, split: str, share: Share) -> Iterator[pa.Table]:
    """The steps from `first` up to `last` to one Arrow row each: the slots that have a pack, and the packs' columns."""
    reader = store.reader(split)
    steps = range(int(batch["first"][0]), int(batch["last"][0]))
    fetched: dict[int, dict[int, dict[str, np.ndarray]]] = {step: {} for step in steps}
    for slot in share.slots:  # slot by slot: consecutive steps of one lie in the same row group
        for step in steps:
            if (place := share.order.place(step, slot)) is not None:
                fetched[step][slot] = reader.pack(place)
    for packs in fetched.values():
        row: dict[str, Any] = {"slots": [np.array(list(packs), np.int32)]}
        for name in PACK_SCHEMA.names:
            arrays = [pack[name] for pack in packs.values()]
            row[name] = [np.concatenate(arrays) if arrays else np.zeros(0)]
            row[f"{name}_sizes"] = [np.array([len(a) for a in arrays], np.int32)]
        yield pa.table(row, schema=_ROW_SCHEMA)


_ROW_SCHEMA = pa.schema(
    [("slots", pa.list_(pa.int32()))]
    + list(PACK_SCHEMA)
    + [(f"{name}_sizes", pa.list_(pa.int32())) for name in PACK_SCHEMA.names]
)


def packs_of_row(table: pa.Table) -> dict[int, dict[str, np.ndarray]]:
    """The way back from `fetch_rows`: packs by slot."""

    def array(name: str) -> np.ndarray:
        return np.asarray(table.column(name).combine_chunks().flatten().to_numpy())

    slots = array("slots").tolist()
    columns = {
        name: np.split(array(name), np.cumsum(array(f"{name}_sizes"))[:-1]) for name in PACK_SCHEMA.names
    }
    return {slot: {name: columns[name][i] for name in columns} for i, slot in enumerate(slots)}
