"""Packed attention: each document of a pack attends to itself alone.

Registered with transformers under the name PACKED, so that every architecture which asks its attention from
`ALL_ATTENTION_FUNCTIONS` runs on packs. No mask is ever built: the cumulative document lengths travel as the keyword
`cu_seq_lens_q` that transformers' own flash-attention path uses.

Axes: B = 1, H = query heads, G = key/value heads, T = tokens of the row, D = query/key head size, V = value head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from raytune_ds.errors import UserError

PACKED = "raytune_packed"

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None], torch.Tensor]


def segment_sdpa(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    segments: torch.Tensor,
    max_segment: int,
    scale: float | None,
) -> torch.Tensor:
    """One causal `scaled_dot_product_attention` a document; any device and dtype. Returns [B, H, T, D]."""
    lengths = [stop - start for start, stop in pairwise(segments.tolist())]
    # split and not slices: the backward pass of each slice would write a gradient as long as the whole row.
    documents = zip(*(x.split(lengths, dim=2) for x in (q_BHTD, k_BGTD, v_BGTD)), strict=True)
    grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        for q, k, v in documents
    ]
    return torch.cat(outputs, dim=2)


def varlen_kernel(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    segments: torch.Tensor,
    max_segment: int,
    scale: float | None,
) -> torch.Tensor:
    """All documents in one FlashAttention kernel of torch's own; CUDA, 16-bit. Returns [B, H, T, D]."""
    from torch.nn.attention.varlen import varlen_attn

    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (q_BHTD, k_BGTD, v_BGTD))
    told: dict[str, Any] = {"enable_gqa": q_THD.shape[1] != k_TGD.shape[1]} if _is_told_of_groups() else {}
    out_THD = varlen_attn(
        q_THD,
        k_TGD,
        v_TGD,
        segments,
        segments,
        max_segment,
        max_segment,
        scale=scale,
        window_size=(-1, 0),
        **told,
    )
    assert isinstance(out_THD, torch.Tensor)
    return out_THD.transpose(0, 1)[None]


@cache
def _is_told_of_groups() -> bool:
    """Whether torch wants to hear that heads share keys; up to 2.11 it saw that itself."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each attention layer: query [B, H, T, D] and key/value to output [B, T, H, V].

    Raises:
        UserError: the model's attention is more than causal attention within a document.
    """
    _require_plain(query, key, others)
    head_size, value_size = query.shape[-1], value.shape[-1]
    if value_size != head_size:
        # MLA's values are narrower than its keys, and the fused kernels want one size. Zeros change nothing.
        value = F.pad(value, (0, head_size - value_size))
    device = query.device.type
    if torch.is_autocast_enabled(
        device
    ):  # rotary embeddings of float32 weights leave queries and keys in float32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    kernel = _kernel(device, query.dtype)
    output = kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    return output[..., :value_size].transpose(1, 2), None


def _require_plain(query: torch.Tensor, key: torch.Tensor, others: Mapping[str, Any]) -> None:
    """What would be left out in silence otherwise: sinks, windows, capped scores, compressed keys."""
    asked = [name for name in ("s_aux", "sliding_window", "softcap") if others.get(name) is not None]
    if query.shape[2] != key.shape[2]:
        asked.append("keys of other tokens")
    if asked:
        raise UserError(
            f"model.name: its attention asks for {' and '.join(asked)}, which training on packs does not give it; such "
            "models are not supported."
        )


def kernel_name(attention: str, device: str, dtype: torch.dtype) -> str:
    """What `model.attention` is on a device: varlen or sdpa."""
    runs = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if runs and attention != "sdpa" else "sdpa"


def _kernel(device: str, dtype: torch.dtype) -> Kernel:
    return varlen_kernel if kernel_name(_attention, device, dtype) == "varlen" else _by_segment


_attention = "auto"
_by_segment: Kernel = segment_sdpa


def choose(attention: str) -> None:
    """Applies `model.attention`: auto and varlen take the varlen kernel where it runs, sdpa never."""
    global _attention
    _attention = attention


def keep_out_of_graphs() -> None:
    """Before layers are compiled: `segment_sdpa` reads lengths on the host, and each of them would make a graph.

    The varlen kernel is an operator that fits into a graph.
    """
    global _by_segment
    _by_segment = torch.compiler.disable(segment_sdpa)


@cache
def register() -> str:
    """Makes packed attention known to transformers and returns the name to ask for."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
    return PACKED
