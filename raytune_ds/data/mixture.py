"""How many rows of which source an epoch has: exact over the epoch, whatever the parallelism.

Without weights each source gives its rows `epochs` times. With weights w the epoch is as long as it can be without a
row of any source coming more than `epochs` times: of source s it has w_s * min over t of (n_t * epochs_t / w_t) rows,
n_t being the rows of source t. A bucket holds a random part of every source (scatter), so a source's rows are shared
out over the buckets in proportion to what each has of it, and the parts add up to the row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from raytune_ds.config import SourceConfig

_WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Source:
    """One source of a run.

    Attributes:
        index: its place among all sources, those that are held out behind the others.
        name: of no other source; metrics have it.
        path: as the config has it.
        held_out: whether it is measured on and never trained on.
        weight, epochs: see config.SourceConfig.
    """

    index: int
    name: str
    path: str
    held_out: bool = False
    weight: float | None = None
    epochs: float = 1.0

    @property
    def is_mixed(self) -> bool:
        """Whether its rows come not just once each."""
        return self.weight is not None or self.epochs != 1.0


def named(sources: Sequence[tuple[SourceConfig, bool]]) -> tuple[Source, ...]:
    """The sources of a config, each with whether it is held out; those without a name get one from their path."""
    taken = {source.name for source, _ in sources if source.name}
    found = []
    for index, (source, held_out) in enumerate(sources):
        name = source.name or _free(_name_of(source.path), taken)
        taken.add(name)
        found.append(Source(index, name, source.path, held_out, source.weight, source.epochs or 1.0))
    return tuple(found)


def quotas(sources: Sequence[Source], rows: Sequence[int]) -> list[int]:
    """How many rows of each source an epoch has.

    Args:
        sources: that are trained on, all with a weight or none.
        rows: that each of them has.
    """
    most = [count * source.epochs for source, count in zip(sources, rows, strict=True)]
    if any(source.weight is None for source in sources):
        return [round(count) for count in most]
    weights = [source.weight or 0.0 for source in sources]
    scale = min(count / weight for count, weight in zip(most, weights, strict=True))
    return [max(1, round(scale * weight)) for weight in weights]


def shared_out(quota: int, counts: Sequence[int]) -> list[int]:
    """`quota` rows over buckets that have `counts` of them, each part within one of its proportion."""
    total = sum(counts)
    if total == 0:
        return [0] * len(counts)
    ends = [quota * int(end) // total for end in np.cumsum(np.asarray(counts, dtype=object))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def times_drawn(keys: np.ndarray, quota: int) -> np.ndarray:
    """How often each of some rows comes, to make `quota` in all: equally often, those with the lowest keys once more.

    Args:
        keys: a random number for each row, shape [n].
        quota: 0 or more.
    """
    if len(keys) == 0:
        return np.zeros(0, np.int64)
    rounds, rest = divmod(quota, len(keys))
    times = np.full(len(keys), rounds)
    times[np.argsort(keys, kind="stable")[:rest]] += 1
    return times


def _name_of(path: str) -> str:
    """`data/law.jsonl`, `data/law/*.jsonl`, `s3://bucket/law/` and `org/law` are all called law."""
    parts = PurePosixPath(path.partition("?")[0] if "://" in path else path).parts
    plain = [part for part in parts if not _WILDCARD.search(part)] or ["data"]
    return re.sub(r"[^\w-]+", "-", plain[-1].split(".")[0]).strip("-") or "data"


def _free(name: str, taken: set[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free
