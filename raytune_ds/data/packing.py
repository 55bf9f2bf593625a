"""Token sequences to packs of `seq_len`, wasting next to nothing. numpy only."""

from __future__ import annotations

import numpy as np


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs documents, the longest first, each into the first pack that has room.

    A maximum tree over the packs' free room finds that pack in O(log n). First-fit-decreasing needs at most
    11/9 of the best possible number of packs, plus one (Johnson 1973); with many short documents, hardly one more.

    Args:
        lengths: tokens of each document, none over `capacity`.
        capacity: tokens of a pack.

    Returns:
        For each pack the indices of its documents, in the order in which they were put in.

    Raises:
        ValueError: a document is longer than a pack.
    """
    if len(lengths) == 0:
        return []
    if int(lengths.max()) > capacity:
        raise ValueError(f"a document of {int(lengths.max())} tokens does not fit a pack of {capacity}")
    most = 2 * int(lengths.sum()) // capacity + 1  # of any two packs one is more than half full
    leaves = 1 << (min(len(lengths), most) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    packs: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        pack = node - leaves
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            most_room = left if left > right else right
            if room[node] == most_room:  # as before, and so is all above
                break
            room[node] = most_room
    return packs
