"""Rows through a model over Ray Data: as many workers as there are GPUs, each with a model of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import ray
import ray.data

from raytune_ds.data.stream import quiet
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.errors import UserError
from raytune_ds.evaluation.items import Item, Outcome, from_json, to_json
from raytune_ds.evaluation.scorer import Scorer
from raytune_ds.evaluation.subject import Subject

CPU_WORKERS = 2
"""At most, where there is no GPU and nobody says how many: each holds a model."""


def fitting_workers() -> int:
    """One a GPU of the cluster, or CPU_WORKERS where it has none."""
    there = ray.cluster_resources()
    return int(there.get("GPU", 0)) or max(1, min(CPU_WORKERS, int(there.get("CPU", 1))))


def over_ray(
    subject: Subject,
    tokenizer: TokenizerSpec,
    ends: Collection[int],
    batches: Sequence[Sequence[tuple[int, Item]]],
    num_workers: int,
) -> Iterator[tuple[int, dict[str, Outcome]]]:
    """What each side makes of each numbered row, as they are done. Ray is needed.

    Raises:
        UserError: a worker says so.
    """
    quiet()
    rows = [[{"number": n, "item": item.to_json()} for n, item in batch] for batch in batches]
    # A block a batch: Ray Data hands them out one by one, and each is computed as it was put together.
    dataset = ray.data.from_blocks([_block(batch) for batch in rows]).map_batches(
        _Worker,
        fn_constructor_args=(subject, tokenizer, ends),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(batches))),
        num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
        num_cpus=1,
    )
    for row in dataset.iter_rows():
        if row["mistake"]:
            raise UserError(row["mistake"])
        yield row["number"], from_json(row["outcomes"])


def _block(batch: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(batch)


class _Worker:
    """A Scorer as Ray Data calls it. Mistakes are told as rows: of an actor that fails Ray hands on a text only."""

    def __init__(self, subject: Subject, tokenizer: TokenizerSpec, ends: Collection[int]) -> None:
        self._mistake = ""
        try:
            self._scorer = Scorer(subject, tokenizer, ends)
        except UserError as error:
            self._mistake = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outcomes = [""] * len(batch["number"])
        if not self._mistake:
            try:
                scored = self._scorer.score([Item.from_json(text) for text in batch["item"]])
                outcomes = list(map(to_json, scored))
            except UserError as error:
                self._mistake = str(error)
        return {
            "number": batch["number"],
            "outcomes": outcomes,
            "mistake": [self._mistake] * len(outcomes),
        }
