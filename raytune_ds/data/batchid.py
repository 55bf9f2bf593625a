"""Which rows a global batch is made of, as one number that the ranks add up from their parts.

The rows of a pack are hashed in their order, and the outcome with the slot that read it. The sum over the slots, modulo
2**64, does not depend on which rank or micro-batch a slot belongs to. Pieces of one long text are one row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xxhash

_HALF = 32


def pack_hash(docs: np.ndarray) -> int:
    """A hash of a pack's rows, whoever reads it; `docs` are their ids, see store.doc_id."""
    return xxhash.xxh3_64_intdigest(docs.astype("<i8", copy=False).tobytes())


def total(packs: Mapping[int, int]) -> int:
    """The fingerprint of a batch, or of a part of one, from the pack hashes by slot."""
    slots = (xxhash.xxh3_64_intdigest(pack.to_bytes(8, "little"), slot) for slot, pack in packs.items())
    return sum(slots) % (1 << 2 * _HALF)


def halves(fingerprint: int) -> tuple[int, int]:
    """Two numbers that float64 adds up exactly over some thousand ranks; `joined` is the way back."""
    high, low = divmod(fingerprint, 1 << _HALF)
    return high, low


def joined(high: float, low: float) -> int:
    """The fingerprint whose parts' halves were added up to these."""
    return ((int(high) << _HALF) + int(low)) % (1 << 2 * _HALF)


def text(fingerprint: int) -> str:
    """As metrics.jsonl has it: 16 hex digits."""
    return f"{fingerprint:016x}"
