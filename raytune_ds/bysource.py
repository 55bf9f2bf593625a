"""Losses and weights, those of each source apart.

Axes: S = documents of a batch, K = 1 + sources: the sum of all, then that of each source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raytune_ds.data.batch import Batch
from raytune_ds.data.store import FILE_SHIFT, Store


@dataclass(frozen=True)
class Sources:
    """The sources whose losses are told apart: none, where all data is of one.

    Attributes:
        names: of the sources.
        of_file: for each file of the store the index of its source.
    """

    names: tuple[str, ...] = ()
    of_file: tuple[int, ...] = (0,)

    @staticmethod
    def of(store: Store) -> Sources:
        """Those of a store."""
        manifest = store.manifest
        return Sources(manifest.sources, manifest.file_sources) if len(manifest.sources) > 1 else Sources()

    def sums(self, batch: Batch, values_S: torch.Tensor) -> torch.Tensor:
        """The sum of the documents' values, of all and of each source: float64 [K]."""
        values_S = values_S.double()
        if not self.names:
            return values_S.sum()[None]
        of_file = torch.tensor(self.of_file, device=values_S.device)
        sources_S = of_file[batch.docs_S >> FILE_SHIFT]
        by_source = values_S.new_zeros(len(self.names)).index_add(0, sources_S, values_S)
        return torch.cat([values_S.sum()[None], by_source])

    def nothing(self, device: torch.device) -> torch.Tensor:
        """What `sums` are added to: zeros [K]."""
        return torch.zeros(1 + len(self.names), dtype=torch.float64, device=device)

    def means(self, name: str, losses: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
        """Mean losses as metrics: `name`, and `name/SOURCE` of those sources that have a weight.

        Args:
            name: of the metric.
            losses: K sums.
            weights: K sums.
        """
        found = {name: losses[0] / weights[0]}
        for source, loss, weight in zip(self.names, losses[1:], weights[1:], strict=True):
            if weight:
                found[f"{name}/{source}"] = loss / weight
        return found


UNTOLD = Sources()
"""All of one source, as far as metrics tell."""
