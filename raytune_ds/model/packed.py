"""From a packed batch to the negative log-likelihood of its supervised tokens: what every objective starts from.

Axes: B = 1, T = tokens, N = supervised tokens, E = hidden size, V = vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytune_ds.data.batch import Batch

# Logits are made for this many tokens at a time and made again in the backward pass: 1,024 tokens of a vocabulary
# of 129,280 take 0.5 GiB in float32, whatever the pack's length.
LOGITS_CHUNK = 1024


class PackedLM(nn.Module):
    """A causal language model that runs on packs and makes logits only where they are trained on."""

    def __init__(self, model: nn.Module, decoder: nn.Module, head: nn.Module, dtype: torch.dtype) -> None:
        """Wraps `model`.

        Args:
            model: what is trained and saved: a Hugging Face model, or a peft model around one.
            decoder: its part from token ids to the last hidden state.
            head: its part from there to logits.
            dtype: what is computed in; parameters may be held in float32 all the same.
        """
        super().__init__()
        self.model = model
        # In a tuple, so that the parameters have one name each: the one under `model`.
        self._parts = (decoder, head)
        self._dtype = dtype

    def forward(self, batch: Batch) -> torch.Tensor:
        """The negative log-likelihood in nats of each target whose weight is not zero: float32 [N]."""
        device = batch.ids_BT.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            return self._losses(batch)

    def _losses(self, batch: Batch) -> torch.Tensor:
        decoder, head = self._parts
        hidden_BTE = decoder(
            input_ids=batch.ids_BT,
            position_ids=batch.positions_BT,
            use_cache=False,
            cu_seq_lens_q=batch.segments,
            cu_seq_lens_k=batch.segments,
            max_length_q=batch.max_segment,
            max_length_k=batch.max_segment,
        ).last_hidden_state
        supervised_BT = batch.weights_BT != 0
        return token_losses(hidden_BTE[supervised_BT], batch.targets_BT[supervised_BT], head)


def token_losses(hidden_NE: torch.Tensor, targets_N: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """The negative log-likelihood of each target, its logits never all in memory at once: float32 [N]."""

    def chunk_losses(hidden_CE: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden_CE).float(), targets_C, reduction="none")

    if len(targets_N) <= LOGITS_CHUNK:
        return chunk_losses(hidden_NE, targets_N)
    chunks = zip(hidden_NE.split(LOGITS_CHUNK), targets_N.split(LOGITS_CHUNK), strict=True)
    return torch.cat([checkpoint(chunk_losses, h, t, use_reentrant=False) for h, t in chunks])
