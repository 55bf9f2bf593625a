"""What is odd about rows, counted, with the first few of the rows, in whatever order they are told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN = 3
"""Rows that are named for each oddity."""


@dataclass
class Sightings:
    """Rows by what is odd about them.

    Attributes:
        counts: rows by the kind of oddity.
        rows: the ids of the first few, see store.doc_id.
        lengths: the longest rows: tokens and id.
    """

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    longest: list[list[int]] = field(default_factory=list)

    def note(self, kinds: Iterable[str], doc: int) -> None:
        """All that is odd about one row."""
        for kind in kinds:
            self._add(kind, 1, [doc])

    def note_length(self, tokens: int, doc: int) -> None:
        """How long a row is."""
        if len(self.longest) < SHOWN or tokens > self.longest[-1][0]:
            self._keep_longest([[tokens, doc]])

    def add(self, other: Sightings) -> None:
        """Takes in those of other rows."""
        for kind, count in other.counts.items():
            self._add(kind, count, other.rows[kind])
        self._keep_longest(other.longest)

    def _add(self, kind: str, count: int, rows: list[int]) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.rows[kind] = sorted([*self.rows.get(kind, ()), *rows])[:SHOWN]

    def _keep_longest(self, rows: list[list[int]]) -> None:
        self.longest = sorted([*self.longest, *rows], key=lambda row: (-row[0], row[1]))[:SHOWN]
