"""Cross-entropy of a linear layer's logits, which are never all in memory at once.

The loss of a token depends on no other token. So its gradient at the hidden state is that of the loss itself times
whatever comes from above, and can be made while its logits are there, instead of making them again in the backward
pass. A trained head's own gradient is a sum over tokens: it is made then, too, as if what comes from above were a
multiple of the weights that the caller expects. Where it turns out to be anything else, the logits are made again.

Axes: N = tokens, C = tokens of a chunk, E = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Room(NamedTuple):
    """What the logits of a chunk may take.

    Attributes:
        bytes: of them in float32.
        tokens: that they are of.
    """

    bytes: int
    tokens: int


# Of a vocabulary of 129,280 the logits of 1,000 tokens take 512 MiB: with fewer a GPU spends its time on reading the
# head's weight. A CPU is as fast with fewer; with a vocabulary of 16,384 it takes 512 tokens and 1,000 the same time,
# and 256 a tenth more.
ROOM = {"cpu": Room(64 << 20, 512), "cuda": Room(512 << 20, 1 << 20)}


def linear_cross_entropy(
    hidden_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    expected_N: torch.Tensor,
) -> torch.Tensor:
    """The negative log-likelihood of each target in nats: float32 [N].

    Args:
        hidden_NE: last hidden states, in the dtype that products are computed in; softmax is in float32.
        weight_VE: of the head.
        bias_V: of the head, if it has one.
        targets_N: int64, below V.
        expected_N: gradients are fastest where the caller multiplies the losses by these, and by one number. An engine
            that computes in 16 bits may have rounded them: then only whole numbers are what is expected.
    """
    wanted = torch.is_grad_enabled()
    losses_N: torch.Tensor = _LinearCrossEntropy.apply(
        hidden_NE, weight_VE, bias_V, targets_N, expected_N.float(), wanted
    )
    return losses_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: torch.Tensor,
        weight_VE: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        expected_N: torch.Tensor,
        wanted: bool,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = (wanted and needed for needed in ctx.needs_input_grad[:3])
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NE.device)
        of_hidden = torch.empty_like(hidden_NE) if wants_hidden else None
        of_head = _HeadGradient(weight_VE, bias_V, wants_weight, wants_bias)
        head_VE = weight_VE.to(hidden_NE.dtype)
        for part, logits_CV, room_CV in _logits(hidden_NE, head_VE, bias_V, targets_N):
            losses_N[part], slopes_CV = _losses(logits_CV, targets_N[part])
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            slopes_CV = room_CV.copy_(slopes_CV)
            if of_hidden is not None:
                torch.mm(slopes_CV, head_VE, out=of_hidden[part])
            of_head.add(slopes_CV, hidden_NE[part], expected_N[part])
        ctx.wants = wants_hidden, wants_weight, wants_bias
        again = (hidden_NE, weight_VE, bias_V, targets_N) if wants_weight or wants_bias else (None,) * 4
        ctx.save_for_backward(of_hidden, of_head.weight, of_head.bias, expected_N, *again)
        return losses_N

    @staticmethod
    def backward(ctx: Any, above_N: torch.Tensor) -> Any:  # type: ignore[override]
        of_hidden, of_weight, of_bias, expected_N, hidden_NE, weight_VE, bias_V, targets_N = ctx.saved_tensors
        if of_hidden is not None:
            # Not with factors in 16 bits: they are often all the same, and one rounding would be that of all gradients.
            of_hidden.mul_(above_N[:, None])
        if of_weight is not None or of_bias is not None:
            factor = above_N.sum() / expected_N.sum().clamp(min=torch.finfo(torch.float32).tiny)
            if torch.allclose(above_N, factor * expected_N, rtol=1e-5, atol=0.0):
                of_weight, of_bias = (None if x is None else x.mul_(factor) for x in (of_weight, of_bias))
            else:
                _, wants_weight, wants_bias = ctx.wants
                of_head = _HeadGradient(weight_VE, bias_V, wants_weight, wants_bias)
                head_VE = weight_VE.to(hidden_NE.dtype)
                for part, logits_CV, room_CV in _logits(hidden_NE, head_VE, bias_V, targets_N):
                    _, slopes_CV = _losses(logits_CV, targets_N[part])
                    of_head.add(room_CV.copy_(slopes_CV), hidden_NE[part], above_N[part])
                of_weight, of_bias = of_head.weight, of_head.bias
            of_weight = None if of_weight is None else of_weight.to(weight_VE.dtype)
            of_bias = None if of_bias is None else of_bias.to(bias_V.dtype)
        return of_hidden, of_weight, of_bias, None, None, None


class _HeadGradient:
    """The sum over tokens of a factor times the loss by the head's parameters, of those that are wanted."""

    def __init__(
        self, weight_VE: torch.Tensor, bias_V: torch.Tensor | None, wants_weight: bool, wants_bias: bool
    ) -> None:
        # In float32, for it is a sum over many chunks.
        self.weight = torch.zeros_like(weight_VE, dtype=torch.float32) if wants_weight else None
        self.bias = (
            torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        )

    def add(self, slopes_CV: torch.Tensor, hidden_CE: torch.Tensor, factors_C: torch.Tensor) -> None:
        """A chunk's."""
        if self.bias is not None:
            self.bias += factors_C @ slopes_CV.float()
        if self.weight is None:
            return
        # The factors go to the smaller of the two.
        factored_CE = (hidden_CE * factors_C[:, None]).to(hidden_CE.dtype)
        if self.weight.dtype == slopes_CV.dtype:
            self.weight.addmm_(slopes_CV.T, factored_CE)
        else:
            self.weight += slopes_CV.T @ factored_CE


def chunks(targets_N: torch.Tensor, vocabulary: int) -> Iterator[slice]:
    """Cuts tokens into parts whose logits may be in memory together; the first is the longest."""
    room = ROOM.get(targets_N.device.type, ROOM["cuda"])
    size = max(1, min(room.tokens, room.bytes // (4 * vocabulary)))
    return (slice(start, min(start + size, len(targets_N))) for start in range(0, len(targets_N), size))


def _logits(
    hidden_NE: torch.Tensor, head_VE: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunk by chunk: which tokens; their logits, float32 [C, V]; and room for as many in the dtype of products, which
    is the logits' own where that is float32, too. All is for the taker to overwrite.

    The memory is that of the chunk before: blocks of such a size that come and go leave gaps.
    """
    bias = None if bias_V is None else bias_V.to(hidden_NE.dtype)
    parts = list(chunks(targets_N, len(head_VE)))
    longest = parts[0].stop if parts else 0
    made_CV = hidden_NE.new_empty(longest, len(head_VE))
    floats_CV = made_CV if made_CV.dtype == torch.float32 else torch.empty_like(made_CV, dtype=torch.float32)
    for part in parts:
        length = part.stop - part.start
        room_CV = logits_CV = torch.mm(hidden_NE[part], head_VE.T, out=made_CV[:length])
        if bias is not None:
            room_CV += bias
        if floats_CV is not made_CV:
            logits_CV = floats_CV[:length].copy_(room_CV)
        yield part, logits_CV, room_CV


def _losses(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, [C], and each loss by its logits: the softmax, less one at the target, [C, V], in their memory."""
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    targets_C1 = targets_C[:, None]
    of_targets_C1 = logits_CV.gather(1, targets_C1)
    sums_C1 = logits_CV.exp_().sum(1, keepdim=True)
    losses_C = (sums_C1.log() - of_targets_C1)[:, 0]
    slopes_CV = logits_CV.div_(sums_C1)
    return losses_C, slopes_CV.scatter_add_(1, targets_C1, slopes_CV.new_full(targets_C1.shape, -1.0))
