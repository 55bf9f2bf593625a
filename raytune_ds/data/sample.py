"""What only the packs of a store can tell, read back from a bounded number of them: shares, and examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from raytune_ds.data.labels import units
from raytune_ds.data.order import Place
from raytune_ds.data.store import FILE_SHIFT, PackReader, Store, doc_id, file_and_row

T = TypeVar("T")
Pack = dict[str, np.ndarray]

MOST_TOKENS = 1 << 22
"""That are read of a store, however large it is: two thousand packs of 2,048."""
FILLS = (50, 80, 90, 95, 98, 99)
"""Between them the bins of how full packs are, in percent; most are nearly full."""


class Unit(NamedTuple):
    """A document, or a pair of them, that is trained on."""

    place: Place
    first: int
    size: int
    source: str


class Bin(NamedTuple):
    """Of a histogram."""

    label: str
    number: int


@dataclass(frozen=True)
class Sample:
    """What was read of the packs that are trained on.

    Attributes:
        num_packs: that were read.
        supervision: documents by the share of their tokens that is trained on.
        fill: packs by the share of their tokens that is not empty.
        examples: of each source at least one.
    """

    num_packs: int
    supervision: tuple[Bin, ...]
    fill: tuple[Bin, ...]
    examples: tuple[Unit, ...]


def sample(store: Store, reader: PackReader, num_examples: int) -> Sample:
    """Reads packs from all over the train split, of which `reader` is; all of them if they are not many."""
    seq_len = store.manifest.seq_len
    supervision: Counter[int] = Counter()
    fill: Counter[int] = Counter()
    found: dict[str, list[Unit]] = defaultdict(list)
    for place, pack in _packs(store, reader):
        supervision.update(_supervision(pack))
        fill[_fill(len(pack["ids"]), seq_len)] += 1
        for source, those in _by_source(store, place, pack).items():
            found[source] += spread(those, num_examples)
    for unit in _rare(store, reader, found):
        found[unit.source].append(unit)
    return Sample(
        fill.total(),
        _bins(supervision, ["none", *(f"{10 * n} to {10 * n + 10}%" for n in range(10)), "all"]),
        _bins(fill, [f"below {FILLS[0]}%", *map("{} to {}%".format, FILLS, [*FILLS[1:], 100]), "full"]),
        tuple(_chosen(found, num_examples)),
    )


def source_of(store: Store, doc: int) -> str:
    """The name of the source that a document is of."""
    file, _ = file_and_row(doc)
    manifest = store.manifest
    return manifest.sources[manifest.file_sources[file]] if manifest.sources else manifest.files[file]


def spread(items: Sequence[T], number: int) -> list[T]:
    """At most `number` of the items, at even distances."""
    number = min(number, len(items))
    return [items[(2 * n + 1) * len(items) // (2 * number)] for n in range(number)]


def _packs(store: Store, reader: PackReader) -> Iterator[tuple[Place, Pack]]:
    size, num_packs = store.manifest.row_group, store.manifest.train.num_packs
    most = max(1, MOST_TOKENS // (size * store.manifest.seq_len))
    for group in spread(range(-(-num_packs // size)), most):
        for row in range(min(size, num_packs - group * size)):
            place = Place(group, row)
            yield place, reader.pack(place)


def _by_source(store: Store, place: Place, pack: Pack) -> dict[str, list[Unit]]:
    starts = units(pack["docs"], pack["labels"]).tolist()
    found: dict[str, list[Unit]] = defaultdict(list)
    for start, end in pairwise(starts):
        source = source_of(store, int(pack["docs"][start]))
        found[source].append(Unit(place, start, end - start, source))
    return found


def _supervision(pack: Pack) -> Iterator[int]:
    """For each document its bin: none, ten of a tenth each, all."""
    ends = np.cumsum(pack["lengths"])
    trained = np.concatenate([[0], np.cumsum(pack["weights"] != 0)])
    counts = np.diff(trained[np.concatenate([[0], ends])])
    for count, length in zip(counts.tolist(), pack["lengths"].tolist(), strict=True):
        yield 0 if not count else 11 if count == length else 1 + 10 * count // length


def _fill(tokens: int, seq_len: int) -> int:
    return len(FILLS) + 1 if tokens == seq_len else sum(100 * tokens >= edge * seq_len for edge in FILLS)


def _bins(counts: Mapping[int, int], labels: Sequence[str]) -> tuple[Bin, ...]:
    """From the first to the last that has something in it."""
    if not counts:
        return ()
    return tuple(Bin(labels[n], counts.get(n, 0)) for n in range(min(counts), max(counts) + 1))


def _rare(store: Store, reader: PackReader, known: Collection[str]) -> Iterator[Unit]:
    """A unit of each source of which the packs that were read have none; only which rows are where is read for it."""
    missing = store.manifest.train.sources.keys() - known
    for group in range(-(-store.manifest.train.num_packs // store.manifest.row_group)):
        if not missing:
            return
        docs, starts = reader.docs(group)
        for file in np.unique(docs >> FILE_SHIFT).tolist():
            source = source_of(store, doc_id(file, 0))
            if source in missing:
                missing = missing - {source}
                at = int(np.argmax(docs >> FILE_SHIFT == file))
                place = Place(group, int(np.searchsorted(starts, at, side="right")) - 1)
                yield _by_source(store, place, reader.pack(place))[source][0]


def _chosen(found: Mapping[str, list[Unit]], number: int) -> list[Unit]:
    """At least one of each source, and no more than an equal share if the others have as many; in the store's order."""
    wanted = dict.fromkeys(found, 1)
    for _ in range(number - len(wanted)):
        more = [source for source in wanted if wanted[source] < len(found[source])]
        if more:
            wanted[min(more, key=wanted.__getitem__)] += 1
    chosen = (unit for source in found for unit in spread(found[source], wanted[source]))
    return sorted(chosen, key=lambda unit: (unit.place.row_group, unit.place.row, unit.first))
