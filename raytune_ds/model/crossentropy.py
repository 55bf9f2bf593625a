"""Cross-entropy of a linear layer's logits, which are never all in memory at once.

The loss of a token depends on no other token. So its gradient at the hidden state is that of the loss itself times
whatever comes from above, and can be made while its logits are there, instead of making them again in the backward
pass. A trained head's own gradient is a sum over tokens: it is made then, too, as if what comes from above were a
multiple of the weights that the caller expects. Where it turns out to be anything else, the logits are made again.

Axes: N = tokens, C = tokens of a chunk, E = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

# Float32 logits that are in memory at a time, in bytes. Of a vocabulary of 129,280 those of 1,000 tokens take 512 MiB:
# with fewer a GPU spends its time on reading the head's weight. A CPU is as fast with fewer, and its caches are small.
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


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
        for part in chunks(targets_N, len(weight_VE)):
            losses_N[part], slopes_CV = _losses(hidden_NE[part], head_VE, bias_V, targets_N[part])
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            if of_hidden is not None:
                torch.mm(slopes_CV.to(head_VE.dtype), head_VE, out=of_hidden[part])
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
            of_hidden = torch.mul(of_hidden, above_N[:, None], out=torch.empty_like(of_hidden))
        if of_weight is not None or of_bias is not None:
            factor = above_N.sum() / expected_N.sum().clamp(min=torch.finfo(torch.float32).tiny)
            if torch.allclose(above_N, factor * expected_N, rtol=1e-5, atol=0.0):
                of_weight, of_bias = (None if x is None else x * factor for x in (of_weight, of_bias))
            else:
                _, wants_weight, wants_bias = ctx.wants
                of_head = _HeadGradient(weight_VE, bias_V, wants_weight, wants_bias)
                head_VE = weight_VE.to(hidden_NE.dtype)
                for part in chunks(targets_N, len(weight_VE)):
                    _, slopes_CV = _losses(hidden_NE[part], head_VE, bias_V, targets_N[part])
                    of_head.add(slopes_CV, hidden_NE[part], above_N[part])
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
        """A chunk's. Overwrites the slopes."""
        if self.weight is None and self.bias is None:
            return
        slopes_CV.mul_(factors_C[:, None])
        if self.bias is not None:
            self.bias += slopes_CV.sum(0)
        if self.weight is not None and self.weight.dtype == hidden_CE.dtype == slopes_CV.dtype:
            self.weight.addmm_(slopes_CV.T, hidden_CE)
        elif self.weight is not None:
            self.weight += slopes_CV.to(hidden_CE.dtype).T @ hidden_CE


def chunks(targets_N: torch.Tensor, vocabulary: int) -> Iterator[slice]:
    """Cuts tokens into parts whose logits may be in memory together."""
    room = LOGITS_BYTES.get(targets_N.device.type, LOGITS_BYTES["cuda"])
    size = max(1, room // (4 * vocabulary))
    return (slice(start, start + size) for start in range(0, len(targets_N), size))


def _losses(
    hidden_CE: torch.Tensor, head_VE: torch.Tensor, bias_V: torch.Tensor | None, targets_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, [C], and each loss by its logits: the softmax, less one at the target, [C, V]. Both float32."""
    bias = None if bias_V is None else bias_V.to(hidden_CE.dtype)
    # All in the memory of the logits, which is most of what there is.
    values_CV = F.linear(hidden_CE, head_VE, bias).float()
    values_CV.sub_(values_CV.amax(1, keepdim=True))
    targets_C1 = targets_C[:, None]
    of_targets_C1 = values_CV.gather(1, targets_C1)
    sums_C1 = values_CV.exp_().sum(1, keepdim=True)
    losses_C = (sums_C1.log() - of_targets_C1)[:, 0]
    slopes_CV = values_CV.div_(sums_C1)
    return losses_C, slopes_CV.scatter_add_(1, targets_C1, slopes_CV.new_full(targets_C1.shape, -1.0))
