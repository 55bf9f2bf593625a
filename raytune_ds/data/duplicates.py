"""Rows that come twice, or nearly: within what is trained on, and of what is held out in what is trained on.

Marks of the same value lie in the same bucket (chunks), so each bucket is looked through by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds.data.chunks import bucket_marks, give_back
from raytune_ds.data.job import Job
from raytune_ds.data.sightings import SHOWN
from raytune_ds.data.sketch import ALIKE, likeness
from raytune_ds.data.store import FILE_SHIFT

KINDS = ("duplicates", "leaked", "near-duplicates", "nearly-leaked")


@dataclass
class Doubles:
    """Rows that are like another one.

    Attributes:
        found: by kind, the row's id to the other's, the first of them.
        trained, held_out: all rows.
    """

    found: dict[str, dict[int, int]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    trained: int = 0
    held_out: int = 0

    @staticmethod
    def of(buckets: Iterable[dict[str, Any]]) -> Doubles:
        """From what `find_doubles` tells of all buckets; a row that is like several is counted once."""
        doubles = Doubles()
        for bucket in buckets:
            doubles._add(bucket)
        doubles._settle()
        return doubles

    def _add(self, bucket: dict[str, Any]) -> None:
        self.trained += bucket["trained"]
        self.held_out += bucket["held_out"]
        for kind, rows in bucket["pairs"].items():
            known = self.found[kind]
            for doc, other in rows.tolist():
                known[doc] = min(other, known.get(doc, other))

    def _settle(self) -> None:
        """Leaves out of near duplicates what is a duplicate."""
        for near, exact in (("near-duplicates", "duplicates"), ("nearly-leaked", "leaked")):
            for doc in self.found[near].keys() & self.found[exact].keys():
                del self.found[near][doc]

    def shown(self, kind: str) -> list[tuple[int, int]]:
        """The first few of a kind."""
        return sorted(self.found[kind].items())[:SHOWN]


def find_doubles(bucket: int, job: Job, thresholds: tuple[int, ...]) -> dict[str, Any]:
    """Of one bucket: how many rows are trained on and held out, and pairs (row, the row it is like) by kind.

    Args:
        bucket: its number.
        job: whose chunks are all done.
        thresholds: by source, the highest eval key that is held out.
    """
    found = _found_in(*bucket_marks(job, bucket), job, thresholds)
    give_back()
    return found


def _found_in(marks: pa.Table, order: np.ndarray, job: Job, thresholds: tuple[int, ...]) -> dict[str, Any]:
    docs, values, exact, eval_keys = (
        marks.column(name).to_numpy()[order] for name in ("doc", "mark", "exact", "eval_key")
    )
    held_out = eval_keys <= _thresholds_of(docs, job, thresholds)
    pairs: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for start, end in _groups(values, exact):
        alike = np.ones(end - start, bool)
        if not exact[start]:
            sketches = marks.column("sketch").take(pa.array(order[start:end])).to_pylist()
            table = np.frombuffer(b"".join(sketches), np.uint8).reshape(end - start, -1)
            # Against the first that is trained on, or the first at all.
            lead = int(np.argmin(held_out[start:end]))
            alike = likeness(table, table[lead]) >= ALIKE
        _note(pairs, docs[start:end][alike], held_out[start:end][alike], bool(exact[start]))
    return {
        "trained": int((exact & ~held_out).sum()),
        "held_out": int((exact & held_out).sum()),
        "pairs": {kind: np.array(found, np.int64).reshape(-1, 2) for kind, found in pairs.items()},
    }


def _thresholds_of(docs: np.ndarray, job: Job, thresholds: tuple[int, ...]) -> np.ndarray:
    return np.array(thresholds, np.uint64)[np.array(job.source_of_file)[docs >> FILE_SHIFT]]


def _groups(values: np.ndarray, exact: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where stretches of several equal marks begin and end."""
    if len(values) == 0:
        return
    changes = np.flatnonzero((values[1:] != values[:-1]) | (exact[1:] != exact[:-1])) + 1
    for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(values)], strict=True):
        if end - start > 1:
            yield start, end


def _note(
    pairs: dict[str, list[tuple[int, int]]], docs: np.ndarray, held_out: np.ndarray, exact: bool
) -> None:
    """Pairs of one stretch, whose rows are in order: each row with the first one that is trained on."""
    trained = np.unique(docs[~held_out])
    if len(trained) == 0:
        return
    first = int(trained[0])
    within, across = ("duplicates", "leaked") if exact else ("near-duplicates", "nearly-leaked")
    pairs[within] += [(int(doc), first) for doc in trained[1:]]
    pairs[across] += [(int(doc), first) for doc in np.unique(docs[held_out])]
