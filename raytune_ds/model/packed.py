"""From a packed batch to the negative log-likelihood of its supervised tokens: what every objective starts from.

Axes: B = 1, T = tokens, N = supervised tokens, E = hidden size, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from raytune_ds.data.batch import Batch
from raytune_ds.model.crossentropy import linear_cross_entropy


class PackedLM(nn.Module):
    """A causal language model that runs on packs and makes logits only where they are trained on."""

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        dtype: torch.dtype,
        autocast: bool = True,
        end_to_end: bool = True,
    ) -> None:
        """Wraps `model`.

        Args:
            model: what is trained and saved: a Hugging Face model, or a peft model around one.
            decoder: its part from token ids to the last hidden state.
            head: its part from there to logits.
            dtype: what is computed in.
            autocast: parameters may be held in float32 all the same.
            end_to_end: the model's attention keeps documents apart that lie end to end in one row; False: it is
                given them side by side, padded to the longest.
        """
        super().__init__()
        self.model = model
        # Parts of `model` are kept in tuples, so that their parameters have one name each: the one under `model`.
        self._decoder = (decoder,)
        assert isinstance(head, nn.Linear)
        self.losses = TokenLosses(head)
        self.dtype = dtype
        self._autocast = autocast and dtype != torch.float32
        self._runs_end_to_end = end_to_end

    def forward(self, batch: Batch) -> torch.Tensor:
        """The negative log-likelihood in nats of each target whose weight is not zero: float32 [N]."""
        device = batch.ids_BT.device.type
        with torch.autocast(device, self.dtype, enabled=self._autocast):
            return self._losses(batch)

    def _losses(self, batch: Batch) -> torch.Tensor:
        hidden_BTE = self._end_to_end(batch) if self._runs_end_to_end else self._side_by_side(batch)
        hidden_NE = hidden_BTE[0].index_select(0, batch.supervised_N)
        return self.losses(hidden_NE, batch.targets_N, batch.weights_N)

    def _side_by_side(self, batch: Batch) -> torch.Tensor:
        """The last hidden states, [B, T, E], of documents in a row each. S = documents, L = the longest of them.

        Attention is causal, so what stands to the left of padding never sees it, and no mask is needed. All documents
        go in one call: ranks that gather parameters together call the model equally often.
        """
        (decoder,) = self._decoder
        documents = batch.ids_BT[0].split(batch.segments.diff().tolist())
        lengths_S = batch.segments.diff().long()
        ids_SL = pad_sequence(documents, batch_first=True)
        is_token_SL = torch.arange(ids_SL.shape[1], device=ids_SL.device) < lengths_S[:, None]
        return decoder(input_ids=ids_SL, use_cache=False).last_hidden_state[is_token_SL][None]

    def _end_to_end(self, batch: Batch) -> torch.Tensor:
        """The same, [B, T, E], of documents that lie end to end."""
        (decoder,) = self._decoder
        hidden_BTE = decoder(
            input_ids=batch.ids_BT,
            position_ids=batch.positions_BT,
            use_cache=False,
            cu_seq_lens_q=batch.segments,
            cu_seq_lens_k=batch.segments,
            max_length_q=batch.max_segment,
            max_length_k=batch.max_segment,
        ).last_hidden_state
        assert isinstance(hidden_BTE, torch.Tensor)
        return hidden_BTE


class TokenLosses(nn.Module):
    """From the last hidden states to losses; the logits are never all in memory at once.

    A module of its own, which takes the head's weight once: an engine that gathers parameters when a module is called
    would gather it chunk by chunk, and ranks with unequal numbers of chunks would wait for each other for ever.
    """

    def __init__(self, head: nn.Linear) -> None:
        """`head` is the linear layer from hidden states to logits."""
        super().__init__()
        self._head = (head,)

    def forward(
        self, hidden_NE: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> torch.Tensor:
        """The negative log-likelihood of each target in nats: float32 [N]; `weights_N` is what it will count."""
        (head,) = self._head
        device = hidden_NE.device.type
        if torch.is_autocast_enabled(device):
            hidden_NE = hidden_NE.to(torch.get_autocast_dtype(device))
        return linear_cross_entropy(hidden_NE, head.weight, head.bias, targets_N, weights_N)
