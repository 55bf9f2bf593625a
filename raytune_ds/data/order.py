"""Which pack every slot of every global batch reads: a pure function of a few integers.

The global batch has B slots. The packs of an epoch stand in a shuffled line (row groups shuffled, and the packs within
each row group), and the line is cut into B pieces of nearly equal length, one a slot. At step s of the epoch slot j
reads the s-th pack of its piece. So

* the packs of a global step are the same whatever the number of workers,
* a slot reads its row groups one after the other, not at random,
* every pack is read exactly once an epoch, the last batch of an epoch being partial,
* a resume needs one integer, and nothing here grows with the data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache


class Permutation:
    """A pseudo-random permutation of range(size) in O(1) memory: a Feistel network, walked until it is in range.

    The cycle walk is from Black and Rogaway, "Ciphers with arbitrary finite domains" (2002).
    """

    # Four are customary for large domains; a chi-square test over tiny ones (five row groups) needs eight to pass.
    ROUNDS = 8

    def __init__(self, size: int, key: str) -> None:
        """`key` is hashed, so any text will do."""
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * self.ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(self.ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        image = self._encrypt(index)
        while image >= self.size:
            image = self._encrypt(image)
        return image

    def inverse(self, image: int) -> int:
        """The index that goes to `image`."""
        index = self._decrypt(image)
        while index >= self.size:
            index = self._decrypt(index)
        return index

    def _round(self, half: int, key: int) -> int:
        # The finaliser of SplitMix64: cheap and well mixed.
        z = (half + key) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return (z ^ (z >> 31)) & self._mask

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            left, right = right, left ^ self._round(right, key)
        return (left << self._half_bits) | right

    def _decrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in reversed(self._keys):
            left, right = right ^ self._round(left, key), left
        return (left << self._half_bits) | right


@dataclass(frozen=True)
class Place:
    """Where a pack lies in the store."""

    row_group: int
    row: int


@dataclass(frozen=True)
class Order:
    """The order of one run.

    Attributes:
        num_packs: packs in the store.
        row_group_size: packs of every row group but the last, which may be shorter.
        global_batch: slots of a global batch.
        seed: of the shuffles; None leaves the store's own order (evaluation).
    """

    num_packs: int
    row_group_size: int
    global_batch: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches an epoch, the last of them partial if need be."""
        return -(-self.num_packs // self.global_batch)

    def epoch_and_step(self, step: int) -> tuple[int, int]:
        """Global step (0-based) to (epoch, step within it)."""
        return divmod(step, self.steps_per_epoch)

    def place(self, step: int, slot: int) -> Place | None:
        """What `slot` reads at global `step`; None where its piece of the epoch has ended."""
        epoch, step_in_epoch = self.epoch_and_step(step)
        start = slot * self.num_packs // self.global_batch
        end = (slot + 1) * self.num_packs // self.global_batch
        position = start + step_in_epoch
        return self._locate(epoch, position) if position < end else None

    def slots(self, rank: int, world_size: int) -> range:
        """The slots that `rank` owns; every slot has exactly one owner."""
        return range(rank, self.global_batch, world_size)

    def _locate(self, epoch: int, position: int) -> Place:
        """The pack at `position` of the epoch's shuffled line."""
        size, full = self.row_group_size, self.num_packs // self.row_group_size
        num_groups = full + bool(self.num_packs % size)
        if self.seed is None:
            return Place(*divmod(position, size))
        groups = _permutation(num_groups, f"{self.seed}/{epoch}/groups")
        # The one short group moves everything behind it forward.
        short_at = groups.inverse(num_groups - 1) * size
        if short_at <= position < short_at + self._last_size:
            nth_group, row = num_groups - 1, position - short_at
        else:
            shift = size - self._last_size if position >= short_at else 0
            place, row = divmod(position + shift, size)
            nth_group = groups(place)
        rows = self._last_size if nth_group == num_groups - 1 else size
        return Place(nth_group, _permutation(rows, f"{self.seed}/{epoch}/{nth_group}")(row))

    @cached_property
    def _last_size(self) -> int:
        return self.num_packs % self.row_group_size or self.row_group_size


@lru_cache(maxsize=4096)
def _permutation(size: int, key: str) -> Permutation:
    return Permutation(size, key)
