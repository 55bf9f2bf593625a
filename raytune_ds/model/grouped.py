"""Routed experts as products of groups: what goes to one expert lies together, and no loop in Python goes over them.

Axes: T = tokens, K = experts a token goes to, S = T * K, E = experts, D = hidden size, I = size within an expert,
N = rows in groups: S, and those that fill groups up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

# oneDNN, which multiplies in 16 bits on CPUs, compiles a kernel for each shape that it has not seen of late, and groups
# have other lengths in each step. Rounded up there are few of them.
ROUNDED = 32

# The compute capability from which on there are kernels for groups.
OLDEST_GPU = (8, 0)

GATE_UP, DOWN = "gate_up_proj", "down_proj"

Product = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Groups:
    """Where each token goes.

    Attributes:
        ends_E: the row behind each expert's last, int32.
        tokens_N: the token in each row; any, in rows that fill up.
        rows_S: the row of each choice of each token.
    """

    ends_E: torch.Tensor
    tokens_N: torch.Tensor
    rows_S: torch.Tensor

    @classmethod
    def of(cls, chosen_TK: torch.Tensor, num_experts: int, dtype: torch.dtype) -> Groups:
        """Groups for products in a dtype, by the experts that each token goes to."""
        rounded = ROUNDED if chosen_TK.device.type == "cpu" and dtype.itemsize == 2 else 1
        experts_S = chosen_TK.reshape(-1)
        experts, order_S = experts_S.sort(stable=True)
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
        counts_E.scatter_add_(0, experts_S, torch.ones_like(experts_S, dtype=torch.int64))
        sizes_E = -(-counts_E // rounded) * rounded
        ends_E = sizes_E.cumsum(0)
        moved_E = (ends_E - sizes_E) - (counts_E.cumsum(0) - counts_E)
        places_S = torch.arange(len(order_S), device=order_S.device)
        rows_S = torch.empty_like(order_S).index_copy_(0, order_S, places_S + moved_E[experts])
        rows = _rows(ends_E, len(rows_S), rounded)
        tokens_N = rows_S.new_zeros(rows).index_copy_(0, rows_S, places_S // chosen_TK.shape[1])
        return cls(ends_E.int(), tokens_N, rows_S)

    def spread(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Tokens to rows, [N, D]."""
        rows: torch.Tensor = _Spread.apply(x_TD, self)  # type: ignore[no-untyped-call]
        return rows

    def collect(self, y_ND: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The sum over each token's rows, weighted, [T, D]; in the wider dtype of the two."""
        y_SD: torch.Tensor = _Collect.apply(y_ND, self)  # type: ignore[no-untyped-call]
        return (y_SD.view(*weights_TK.shape, -1) * weights_TK[..., None]).sum(1)


# Both ways are reads of whole rows, forward and backward: the backward pass of torch's own read adds row by row, and on
# CUDA in any order.


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, groups: Groups) -> torch.Tensor:
        ctx.groups, ctx.tokens = groups, len(x_TD)
        return x_TD.index_select(0, groups.tokens_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_SD = grad_ND.index_select(0, ctx.groups.rows_S)
        return grad_SD.view(ctx.tokens, -1, grad_ND.shape[1]).sum(1), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, groups: Groups) -> torch.Tensor:
        ctx.groups = groups
        return y_ND.index_select(0, groups.rows_S)

    @staticmethod
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None]:
        groups: Groups = ctx.groups
        grad_ND = grad_SD.new_zeros(len(groups.tokens_N), grad_SD.shape[1])
        return grad_ND.index_copy_(0, groups.rows_S, grad_SD), None


def _rows(ends_E: torch.Tensor, chosen: int, rounded: int) -> int:
    """Of all groups; where there are no values to look at, as many as there can be."""
    if rounded == 1:
        return chosen
    return chosen + len(ends_E) * (rounded - 1) if isinstance(ends_E, FakeTensor) else int(ends_E[-1])


def grouped_product(x_ND: torch.Tensor, weight_EOD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Each group times its expert's matrix, x W^T: [N, O]; rows behind the last group hold anything.

    A frozen weight gets no gradient, and a group without rows one of zero.
    """
    return F.grouped_mm(x_ND, weight_EOD.transpose(1, 2), offs=ends_E)


def experts_forward(
    experts: Any,
    hidden_TD: torch.Tensor,
    chosen_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    product: Product | None = None,
) -> torch.Tensor:
    """What fused experts of transformers compute, as its `ExpertsInterface` asks it: [T, D].

    Args:
        experts: a module that `fits`.
        hidden_TD: of each token.
        chosen_TK: the experts of each token.
        weights_TK: of what these say.
        product: of the experts' parameter of a name with rows in groups, given the rows and the ends of the groups.
    """
    product = product or (lambda name, x_ND, ends_E: grouped_product(x_ND, getattr(experts, name), ends_E))
    dtype = getattr(experts, GATE_UP).dtype
    groups = Groups.of(chosen_TK, experts.num_experts, dtype)
    within_NI = experts._apply_gate(product(GATE_UP, groups.spread(hidden_TD.to(dtype)), groups.ends_E))
    return groups.collect(product(DOWN, within_NI, groups.ends_E), weights_TK).to(hidden_TD.dtype)


def fits(module: nn.Module) -> bool:
    """Whether a module is fused experts of transformers that compute as `experts_forward` does, and are to."""
    facts = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    if [getattr(module, fact, None) for fact in facts] != [True, False, False, False, False]:
        return False
    asked = getattr(module.config, "_experts_implementation", None) in (None, "grouped_mm")
    return asked and (not torch.cuda.is_available() or torch.cuda.get_device_capability() >= OLDEST_GPU)
