"""Training sequences to ones that fit a pack: split, cut or left out."""

from __future__ import annotations

from typing import Protocol

from raytune_ds.data.formats import RowError
from raytune_ds.data.job import Tally
from raytune_ds.data.labels import Label
from raytune_ds.data.template import Encoded


class Limits(Protocol):
    """What is done about long sequences, as the config's data section says."""

    @property
    def seq_len(self) -> int:
        """Tokens of a pack."""

    @property
    def on_long_row(self) -> str:
        """`truncate` or `drop`."""


def fit(sequences: list[Encoded], limits: Limits, tally: Tally, raw_text: bool) -> list[Encoded]:
    """Sequences that fit a pack: raw text is split, anything else cut or dropped as configured, a pair as one.

    Raises:
        RowError: nothing is supervised.
    """
    if any(sequence.label == Label.CHOSEN for sequence in sequences):
        return _fit_pair(sequences, limits, tally)
    longest = limits.seq_len + 1  # the last token is only ever a target
    fitting: list[Encoded] = []
    dropped = 0
    for sequence in sequences:
        if len(sequence.ids) > longest and raw_text:
            starts = range(0, len(sequence.ids) - 1, limits.seq_len)
            pieces = [sequence.part(start, start + longest) for start in starts]
            fitting += [piece for piece in pieces if piece.num_supervised]
            tally.num_split += 1
        elif len(sequence.ids) > longest:
            cut = sequence.part(0, longest)
            if limits.on_long_row == "truncate" and cut.num_supervised:
                tally.num_truncated += 1
                fitting.append(cut)
            else:
                dropped += 1
        elif sequence.num_supervised:
            fitting.append(sequence)
    tally.num_dropped_long += dropped
    if not fitting and not dropped:
        raise RowError("nothing in it is trained on: no supervised token is left after rendering")
    return fitting


def _fit_pair(pair: list[Encoded], limits: Limits, tally: Tally) -> list[Encoded]:
    """A pair that fits a pack, whole or with the ends of its answers cut off; nothing if it is dropped.

    Raises:
        RowError: nothing is supervised in one of the two.
    """
    chosen, rejected = (len(side.ids) - 1 for side in pair)
    if not all(side.num_supervised for side in pair):
        raise RowError(
            "nothing in one of its answers is trained on: no supervised token is left after rendering"
        )
    if chosen + rejected <= limits.seq_len:
        return pair
    room = _rooms(chosen, rejected, limits.seq_len)
    cut = [side.part(0, length + 1) for side, length in zip(pair, room, strict=True)]
    teaches = all(side.num_supervised for side in cut) and cut[0].ids != cut[1].ids
    if limits.on_long_row == "truncate" and teaches:
        tally.num_truncated += 1
        return cut
    tally.num_dropped_long += 1
    return []


def _rooms(chosen: int, rejected: int, room: int) -> tuple[int, int]:
    """What each of two lengths gets of a room that is too small: half of it, and what the other does not need."""
    for_chosen = min(chosen, max(room // 2, room - rejected))
    return for_chosen, min(rejected, room - for_chosen)
