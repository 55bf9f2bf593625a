"""One micro-batch as every objective sees it.

Axes: B = 1 (packs lie end to end in one row, so nothing is padding), T = tokens of the row, S = segments (documents),
N = targets whose weight is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from raytune_ds.data import batchid
from raytune_ds.data.labels import Label
from raytune_ds.data.share import Share, fetch_step
from raytune_ds.data.store import Store

Pack = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Packed documents and what is trained on in them.

    Attributes:
        ids_BT: int64, token ids.
        targets_BT: int64, the token that follows each position within its document.
        weights_BT: float32, the loss weight of each target; 0 where not trained on.
        positions_BT: int64, the position within the document.
        segments: int32 of S + 1, cumulative document lengths; documents never see each other.
        supervised_N: int64, where in the row the targets are whose weight is not zero. It is made with the batch: a GPU
            would have to be waited for, if it were looked for there.
        segment_of_target_N: int64, the document that each of them is in.
        labels_S: int64, a `Label` a document; a chosen answer is followed by the rejected one of its row.
        max_segment: the longest document in tokens.
        docs_S: int64, the row of the store's files that each document is of; see store.doc_id.
        rows: which rows of the store it is made of; see batchid.
    """

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments: torch.Tensor
    supervised_N: torch.Tensor
    segment_of_target_N: torch.Tensor
    labels_S: torch.Tensor
    max_segment: int
    docs_S: torch.Tensor
    rows: int = 0

    @property
    def targets_N(self) -> torch.Tensor:
        """The targets whose weight is not zero: int64 [N]."""
        return self.targets_BT[0, self.supervised_N]

    @property
    def weights_N(self) -> torch.Tensor:
        """Their weights: float32 [N]."""
        return self.weights_BT[0, self.supervised_N]

    def by_segment(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sums over the targets of each document: values [N] to [S]."""
        return values_N.new_zeros(len(self.docs_S)).index_add(0, self.segment_of_target_N, values_N)

    @property
    def weights_S(self) -> torch.Tensor:
        """The sum of the loss weights of each document: float64 [S]."""
        return self.by_segment(self.weights_N.double())

    @property
    def weight(self) -> torch.Tensor:
        """The sum of the loss weights, a float64 scalar."""
        return self.weights_BT.sum(dtype=torch.float64)

    @property
    def num_tokens(self) -> int:
        """Tokens the model runs on."""
        return self.ids_BT.numel()

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on, whatever their weights."""
        return len(self.supervised_N)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it attends to, itself included, in causal attention within documents."""
        lengths_S = self.segments.diff().long()
        return int((lengths_S * (lengths_S + 1) // 2).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`.

        A GPU takes it from pinned memory, whenever it comes to it: from any other, the host would wait for all that
        the GPU has still to do.
        """

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if device.type == "cuda" and not value.is_cuda:
                value = value.pin_memory()
            return value.to(device, non_blocking=True)

        return Batch(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def collate(packs: Sequence[Pack], rows: int = 0) -> Batch:
    """Packs end to end as one batch.

    Args:
        packs: each with ids, targets (int), weights (float) of one length, lengths and docs of its documents; labels
            where they are not plain. No pack at all gives the empty step's batch: one token of weight zero, so that
            every rank of a sharded model can take part in its collectives.
        rows: see Batch.
    """
    if not packs:
        packs = [EMPTY_PACK]
    lengths = np.concatenate([pack["lengths"] for pack in packs]).astype(np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    segments = np.concatenate([[0], ends]).astype(np.int32)

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([pack[name] for pack in packs]).astype(dtype)

    weights = joined("weights", np.float32)
    (supervised,) = weights.nonzero()

    return Batch(
        ids_BT=torch.from_numpy(joined("ids", np.int64))[None],
        targets_BT=torch.from_numpy(joined("targets", np.int64))[None],
        weights_BT=torch.from_numpy(weights)[None],
        positions_BT=torch.from_numpy(positions)[None],
        segments=torch.from_numpy(segments),
        supervised_N=torch.from_numpy(supervised),
        segment_of_target_N=torch.from_numpy(np.searchsorted(ends, supervised, side="right")),
        labels_S=torch.from_numpy(np.concatenate([_labels(pack) for pack in packs]).astype(np.int64)),
        max_segment=int(lengths.max()),
        docs_S=torch.from_numpy(joined("docs", np.int64)),
        rows=rows,
    )


def _labels(pack: Pack) -> np.ndarray:
    return pack["labels"] if "labels" in pack else np.full(len(pack["lengths"]), Label.PLAIN)


EMPTY_PACK: Pack = {
    "ids": np.zeros(1, np.int64),
    "targets": np.zeros(1, np.int64),
    "weights": np.zeros(1, np.float32),
    "lengths": np.ones(1, np.int64),
    "docs": np.zeros(1, np.int64),
}


def cut(share: Share, packs: Mapping[int, Pack]) -> list[Batch]:
    """One step's packs, by slot, as the share's micro-batches."""
    batches = []
    for part in share.micro_batches():
        mine = {slot: packs[slot] for slot in part if slot in packs}
        rows = batchid.total({slot: batchid.pack_hash(pack["docs"]) for slot, pack in mine.items()})
        batches.append(collate(list(mine.values()), rows))
    return batches


def read(store: Store, split: str, share: Share, steps: range) -> Iterator[list[Batch]]:
    """The micro-batches of each step, read when asked for, in this process."""
    reader = store.reader(split)
    for step in steps:
        yield cut(share, fetch_step(reader, share, step))
