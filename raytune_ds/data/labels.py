"""What a document is to an objective that judges answers, and which documents belong together. numpy only."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Label(IntEnum):
    """As the packed store has it, one a document."""

    PLAIN = 0
    CHOSEN = 1
    """The first of a pair; its REJECTED follows at once."""
    REJECTED = 2
    DESIRABLE = 3
    UNDESIRABLE = 4


def units(docs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Where each unit begins, that is a pair or any other document, and the number of documents at the end.

    Args:
        docs: the row that each document came from.
        labels: of each document.

    Raises:
        ValueError: half a pair is missing.
    """
    chosen, rejected = labels == Label.CHOSEN, labels == Label.REJECTED
    pairs = chosen[:-1] & rejected[1:] & (docs[:-1] == docs[1:])
    if not np.count_nonzero(pairs) == np.count_nonzero(chosen) == np.count_nonzero(rejected):
        raise ValueError("a chosen answer is not followed by the rejected one of its row")
    return np.append(np.flatnonzero(~rejected), len(labels))
