"""The loss of each sequence under a loaded model, on packs and with logits only where they count, as in training.

Axes: B = 1, T = tokens of the row, N = supervised tokens, E = hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from raytune_ds.data.batch import Batch, Pack, collate
from raytune_ds.evaluation.items import TokenSequence
from raytune_ds.model import attention
from raytune_ds.model.crossentropy import chunks
from raytune_ds.model.load import attends_causally, parts

TOKENS_AT_ONCE = 8192
"""In one forward pass, if no single sequence is longer."""


@torch.inference_mode()
def losses(model: Any, sequences: Sequence[TokenSequence]) -> list[tuple[float, float]]:
    """(sum of weighted negative log-likelihoods in nats, sum of weights) of each sequence.

    Args:
        model: a transformers or peft model in evaluation mode.
        sequences: of at least two tokens each.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: list[tuple[float, float]] = []
    with _end_to_end(base) as is_packed:
        packs = [_pack(number, sequence) for number, sequence in enumerate(sequences)]
        for together in _batches(packs) if is_packed else ([pack] for pack in packs):
            batch = collate(together).to(base.device)
            sums_S = batch.by_segment(
                _token_losses(base, batch, is_packed).double() * batch.weights_N.double()
            )
            found += zip(sums_S.tolist(), batch.weights_S.tolist(), strict=True)
    return found


@contextlib.contextmanager
def _end_to_end(base: Any) -> Iterator[bool]:
    """Gives the model the attention of training for a while, so that documents can lie end to end; False: it can't."""
    if not attends_causally(base.config):
        yield False
        return
    before = base.config._attn_implementation
    base.set_attn_implementation(attention.register())
    try:
        yield base.config._attn_implementation == attention.PACKED
    finally:
        base.set_attn_implementation(before)


def _pack(number: int, sequence: TokenSequence) -> Pack:
    ids = np.array(sequence.ids)
    return {
        "ids": ids[:-1],
        "targets": ids[1:],
        "weights": np.array(sequence.weights[1:], np.float32),
        "lengths": np.array([len(ids) - 1]),
        "docs": np.array([number]),
    }


def _batches(packs: Sequence[Pack]) -> Iterator[list[Pack]]:
    """The packs in order, as many at a time as TOKENS_AT_ONCE permits."""
    waiting: list[Pack] = []
    for pack in packs:
        if waiting and sum(len(p["ids"]) for p in [*waiting, pack]) > TOKENS_AT_ONCE:
            yield waiting
            waiting = []
        waiting.append(pack)
    if waiting:
        yield waiting


def _token_losses(base: Any, batch: Batch, is_packed: bool) -> torch.Tensor:
    """The negative log-likelihood of each target whose weight is not zero: float32 [N]."""
    decoder, head = parts(base)
    hidden_BTE = decoder(
        input_ids=batch.ids_BT, use_cache=False, **(_borders(batch) if is_packed else {})
    ).last_hidden_state
    hidden_NE = hidden_BTE[0].index_select(0, batch.supervised_N)
    targets_N = batch.targets_N
    losses_N = torch.empty(len(targets_N), device=targets_N.device)
    for part in chunks(targets_N, base.config.get_text_config().vocab_size):
        # The head is called, not multiplied with: an adapter may have wrapped it.
        losses_N[part] = F.cross_entropy(head(hidden_NE[part]).float(), targets_N[part], reduction="none")
    return losses_N


def _borders(batch: Batch) -> dict[str, Any]:
    """What packed attention keeps documents apart by."""
    return {
        "position_ids": batch.positions_BT,
        "cu_seq_lens_q": batch.segments,
        "cu_seq_lens_k": batch.segments,
        "max_length_q": batch.max_segment,
        "max_length_k": batch.max_segment,
    }
