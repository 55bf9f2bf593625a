"""All rows through one model: in this process, or by workers of Ray Data."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

from raytune_ds.console import ProgressLine
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.evaluation.items import Item, Outcome
from raytune_ds.evaluation.scorer import Scorer
from raytune_ds.evaluation.scoring import over_ray
from raytune_ds.evaluation.subject import Subject

Numbered = tuple[int, dict[str, Outcome]]


def outcomes(
    subject: Subject,
    tokenizer: TokenizerSpec,
    ends: Collection[int],
    items: Sequence[Item],
    num_workers: int,
    batch_size: int,
) -> list[dict[str, Outcome]]:
    """What each side of a model makes of each row, in the order of the rows.

    Args:
        subject: the model.
        tokenizer: of the prompts.
        ends: tokens that end an answer.
        items: the rows.
        num_workers: of Ray Data, each with a model of its own; 0: this process.
        batch_size: rows at a time.

    Raises:
        UserError: the model can't be loaded, or does not know a token of the rows.
    """
    batches = _batches(items, batch_size)
    if num_workers:
        done = over_ray(subject, tokenizer, ends, batches, num_workers)
    else:
        done = _here(Scorer(subject, tokenizer, ends), batches)
    found: dict[int, dict[str, Outcome]] = {}
    started = time.monotonic()
    with ProgressLine(f"measuring {' and '.join(subject.sides)}", len(items)) as progress:
        for number, outcome in done:
            found[number] = outcome
            rate = len(found) / max(1e-3, time.monotonic() - started)
            progress.update(len(found), f"{len(found):,} of {len(items):,} rows, {rate:.1f} rows/s")
    return [found[number] for number in range(len(items))]


def _batches(items: Sequence[Item], size: int) -> list[list[tuple[int, Item]]]:
    """Rows of like length together, so that little is padding; the longest first, so that no worker ends late."""
    order = sorted(
        enumerate(items), key=lambda pair: (bool(pair[1].prompt), pair[1].num_tokens), reverse=True
    )
    return [order[start : start + size] for start in range(0, len(order), size)]


def _here(scorer: Scorer, batches: Sequence[Sequence[tuple[int, Item]]]) -> Iterator[Numbered]:
    for batch in batches:
        scored = scorer.score([item for _, item in batch])
        yield from zip((number for number, _ in batch), scored, strict=True)
