"""From all that was seen of the rows to findings, and whether a run may begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from raytune_ds.console import warn
from raytune_ds.data.duplicates import KINDS as DOUBLES
from raytune_ds.data.duplicates import Doubles
from raytune_ds.data.findings import KINDS, Finding, in_order, of_lengths, of_writing
from raytune_ds.data.job import Tally
from raytune_ds.data.sightings import SHOWN
from raytune_ds.data.store import Store, file_and_row
from raytune_ds.errors import UserError

T = TypeVar("T")

_WRITING = "writing:"


def conclude(tally: Tally, doubles: Doubles) -> tuple[Finding, ...]:
    """All findings, the grave ones first."""
    seen = tally.sightings
    usable = tally.num_rows - tally.num_rejected
    found = [
        Finding(kind, count, usable, tuple(seen.rows[kind]))
        for kind, count in seen.counts.items()
        if not kind.startswith(_WRITING)
    ]
    found += of_writing(_scripts(seen.counts), _scripts(seen.rows))
    found += of_lengths({int(upper): count for upper, count in tally.lengths.items()}, seen.longest)
    found += _of_doubles(doubles)
    return tuple(in_order(found))


def require_sound(store: Store, on_finding: str) -> None:
    """Says what was found, and stops where training would be pointless.

    Raises:
        UserError: a finding stops training, and `on_finding` is fail.
    """
    found = store.manifest.findings
    grave = [finding for finding in found if finding.stops]
    if grave and on_finding == "fail":
        lines = [line for finding in grave for line in described(finding, store)]
        raise UserError(
            "what was prepared from data.sources can't teach what it is meant to:\n"
            + "\n".join(lines)
            + "\nraytune-ds data shows it token by token. To train on it all the same, set data.on_finding=warn."
        )
    for finding in found:
        warn("data: " + "\n  ".join(described(finding, store)))


def described(finding: Finding, store: Store) -> Iterator[str]:
    """A finding in words, with its rows and what to do."""
    yield str(finding)
    for number, doc in enumerate(finding.rows):
        like = f", like {_place(finding.others[number], store)}" if finding.others else ""
        yield f"  {_place(doc, store)}{like}"
    yield f"  {KINDS[finding.kind].advice}"


def _place(doc: int, store: Store) -> str:
    file, row = file_and_row(doc)
    return f"{store.manifest.files[file]}, row {row + 1}"


def _scripts(by_kind: Mapping[str, T]) -> dict[str, T]:
    return {
        kind.removeprefix(_WRITING): value for kind, value in by_kind.items() if kind.startswith(_WRITING)
    }


def _of_doubles(doubles: Doubles) -> Iterator[Finding]:
    for kind in DOUBLES:
        if len(pairs := doubles.found(kind)):
            of = doubles.held_out if "leaked" in kind else doubles.trained
            rows, others = pairs[:SHOWN].T.tolist()
            yield Finding(kind, len(pairs), of, tuple(rows), tuple(others))
