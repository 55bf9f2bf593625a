"""Rows that come twice, or nearly: within what is trained on, and of what is held out in what is trained on.

Marks of the same value lie in the same bucket (chunks), so each bucket is looked through by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ds.data.chunks import bucket_marks, give_back
from raytune_ds.data.job import Job
from raytune_ds.data.sketch import ALIKE, MINIMA, likeness
from raytune_ds.data.store import in_one

KINDS = ("duplicates", "leaked", "near-duplicates", "nearly-leaked")
_AT_ONCE = 1 << 14  # sketches that are compared
_FEW = 1 << 16  # pairs that may wait


class Doubles:
    """Rows that are like another one.

    Attributes:
        trained, held_out: all rows.
    """

    def __init__(self) -> None:
        """None so far."""
        self.trained = self.held_out = 0
        self._found = {kind: _Pairs() for kind in KINDS}

    @staticmethod
    def of(buckets: Iterable[dict[str, Any]]) -> Doubles:
        """From what `find_doubles` tells of all buckets; a row that is like several is counted once."""
        doubles = Doubles()
        for bucket in buckets:
            doubles.trained += bucket["trained"]
            doubles.held_out += bucket["held_out"]
            for kind, pairs in bucket["pairs"].items():
                doubles._found[kind].add(pairs)
        return doubles

    def found(self, kind: str) -> np.ndarray:
        """Ids of rows, each with that of the first row that it is like, of one of KINDS: int64 [n, 2], in order."""
        pairs = self._found[kind].each_once()
        exact = {"near-duplicates": "duplicates", "nearly-leaked": "leaked"}.get(kind)
        return pairs if exact is None else pairs[~np.isin(pairs[:, 0], self._found[exact].each_once()[:, 0])]


class _Pairs:
    """Pairs of ids, of which there may be several for a row; only the one with the first of the others stays.

    It takes 16 bytes a row, and little more while others come.
    """

    def __init__(self) -> None:
        self._known = np.empty((0, 2), np.int64)
        self._new: list[np.ndarray] = []

    def add(self, pairs: np.ndarray) -> None:
        if len(pairs) == 0:
            return
        self._new.append(pairs.copy())  # or all that came with them would stay as well
        if sum(map(len, self._new)) > max(_FEW, len(self._known) // 4):
            self.each_once()

    def each_once(self) -> np.ndarray:
        """int64 [n, 2], in order."""
        if self._new:
            self._known = _each_once(np.concatenate([self._known, *self._new]))
            self._new = []
        return self._known


def _each_once(pairs: np.ndarray) -> np.ndarray:
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    first = np.ones(len(pairs), bool)
    first[1:] = pairs[1:, 0] != pairs[:-1, 0]
    return pairs[first]


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
    held_out = eval_keys <= np.array(thresholds, np.uint64)[job.sources_of(docs)]
    places, leads = _stretches(values, exact, held_out)
    alike = exact[places]
    for near in np.array_split(np.flatnonzero(~alike), 1 + len(alike) // _AT_ONCE):
        here, there = (_sketches(marks, order[which[near]]) for which in (places, leads))
        alike[near] = likeness(here, there) >= ALIKE
    others = alike & ~held_out[leads] & (docs[places] != docs[leads])
    places, leads = places[others], leads[others]
    kinds = 2 * ~exact[places] + held_out[places]
    pairs = np.stack([docs[places], docs[leads]], axis=1)
    return {
        "trained": int((exact & ~held_out).sum()),
        "held_out": int((exact & held_out).sum()),
        "pairs": {kind: _each_once(pairs[kinds == number]) for number, kind in enumerate(KINDS)},
    }


def _sketches(marks: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Of rows of marks: uint8 [n, MINIMA]."""
    taken = in_one(marks.column("sketch").take(pa.array(rows)))
    return np.frombuffer(b"".join(taken.to_pylist()), np.uint8).reshape(len(rows), MINIMA)


def _stretches(values: np.ndarray, exact: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of marks that equal others, and for each the place of the one that its stretch is held against.

    That is the first of the stretch that is trained on, or the first at all.
    """
    numbers = np.arange(len(values))
    begins = np.ones(len(values), bool)
    begins[1:] = (values[1:] != values[:-1]) | (exact[1:] != exact[:-1])
    starts = np.flatnonzero(begins)
    trained = np.where(held_out, len(values), numbers)
    leads = np.minimum.reduceat(trained, starts) if len(starts) else starts
    leads = np.where(leads < len(values), leads, starts)
    sizes = np.diff(starts, append=len(values))
    return numbers[np.repeat(sizes > 1, sizes)], np.repeat(leads[sizes > 1], sizes[sizes > 1])
