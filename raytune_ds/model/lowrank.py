"""LoRA on bare parameters, computed on the tokens: x W^T + scale (x A^T) B^T.

Peft 0.21 adds scale B A to the parameter in each forward pass, so that the module sees an ordinary weight. Autograd
then makes the gradient of the whole weight to get those of A and B out of it, and in 16 bits the sum loses what of B A
is smaller than the last bit of W. Here the weight stays as it is, and the two thin products are made of what the module
is given; with a frozen W no gradient of its size is ever made. Modules, parameters and their names are peft's.

Axes: N = rows (tokens, or tokens in groups), E = experts, R = rank, I = inputs, O = outputs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raytune_ds.model import grouped
from raytune_ds.model.adapters import NAME


def on_tokens(owner: nn.Module) -> bool:
    """Whether an adapter of a module's bare parameters is computed on the tokens, or else in peft's own way."""
    return type(owner).forward is nn.Linear.forward or grouped.fits(owner)


def compute_on_tokens(ready: nn.Module) -> None:
    """Lets those adapters of bare parameters be so computed that can be, for as long as the module lives.

    Args:
        ready: with an adapter around it, or without one.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrappers: dict[nn.Module, list[Any]] = {}
    for module in ready.modules():
        if isinstance(module, ParamWrapper):
            wrappers.setdefault(module.get_base_layer(), []).append(module)
    for owner, around in wrappers.items():
        if on_tokens(owner):
            (_Experts if grouped.fits(owner) else _Linear)(owner, around)


class _OnTokens(ABC):
    """Stands in for a module's forward pass; peft decides, as ever, when an adapter takes part."""

    def __init__(self, owner: Any, wrappers: Sequence[Any]) -> None:
        """`wrappers` are peft's, one for each adapted parameter of the owner."""
        self._owner, self._plain = owner, owner.forward
        self._active: dict[str, Any] = {}
        owner.forward = self.forward
        for wrapper in wrappers:
            # What peft enters around the owner's forward pass.
            wrapper._activate_lora = partial(self._activate, wrapper)

    @contextlib.contextmanager
    def _activate(self, wrapper: Any, adapters: Sequence[str]) -> Iterator[None]:
        if NAME in adapters:
            self._active[wrapper.parameter_name] = wrapper
        try:
            yield
        finally:
            self._active.pop(wrapper.parameter_name, None)

    @abstractmethod
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """What the owner computes, with the adapters that are active."""


class _Linear(_OnTokens):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """See _OnTokens; [..., I] to [..., O]."""
        y: torch.Tensor = self._plain(x)
        for wrapper in self._active.values():
            a_RI, b_OR = wrapper.lora_A[NAME].weight, wrapper.lora_B[NAME].weight
            h = F.linear(x, a_RI.to(x.dtype)) * wrapper.scaling[NAME]
            y = y + F.linear(h, b_OR.to(x.dtype))
        return y


class _Experts(_OnTokens):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """See _OnTokens and `grouped.experts_forward`."""
        chosen_TK, weights_TK = others
        return grouped.experts_forward(self._owner, x, chosen_TK, weights_TK, self._product)

    def _product(self, name: str, x_NI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        y_NO = grouped.grouped_product(x_NI, getattr(self._owner, name), ends_E)
        if name in self._active:
            b_EOR, a_ERI, scale = self._active[name].get_delta_factors(NAME)
            h_NR = grouped.grouped_product(x_NI, _wide(a_ERI, dim=1), ends_E) * scale
            y_NO = y_NO + grouped.grouped_product(h_NR, _wide(b_EOR, dim=2), ends_E)
        return y_NO


def _wide(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """With the rank filled up by zeros, so that rows begin where grouped kernels can read them: every 16 bytes."""
    missing = -factor.shape[dim] % 8
    return F.pad(factor, (0, 0) * (factor.ndim - 1 - dim) + (0, missing)) if missing else factor.contiguous()
