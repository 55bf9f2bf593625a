"""LoRA on the tokens: x W^T + scale (x A^T) B^T, with nothing made or kept that this does not need.

Modules, parameters and their names are peft's, and so is what is saved; two of its ways to compute are replaced.

Of bare parameters (routed experts among them) peft 0.21 adds scale B A to the parameter in each forward pass, so that
the module sees an ordinary weight. Autograd then makes the gradient of the whole weight to get those of A and B out of
it, and in 16 bits the sum loses what of B A is smaller than the last bit of W. Here the weight stays as it is, and the
two thin products are made of what the module is given; with a frozen W no gradient of its size is ever made.

Around linear layers peft copies the input to A's dtype and keeps the copy, multiplies the whole output by the scale,
and adds it in a pass of its own. Here there are five products forward and backward, the sums part of them.

Dropout, DoRA and other variants compute in peft's own way.

Axes: N = rows (tokens, or tokens in groups), E = experts, R = rank, I = inputs, O = outputs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raytune_ds.model import grouped
from raytune_ds.model.adapters import NAME


def on_tokens(owner: nn.Module) -> bool:
    """Whether an adapter of a module's bare parameters is computed on the tokens, or else in peft's own way."""
    return _is_linear(owner) or grouped.fits(owner)


def _is_linear(owner: nn.Module) -> bool:
    return isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward


def compute_on_tokens(ready: nn.Module) -> None:
    """Lets LoRA adapters be so computed, those that can be, for as long as the module lives.

    Args:
        ready: with an adapter around it, or without one.
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    bare: dict[nn.Module, list[Any]] = {}
    for module in ready.modules():
        if isinstance(module, ParamWrapper):
            bare.setdefault(module.get_base_layer(), []).append(module)
        elif type(module) is Linear and _is_plain(module):
            _Linear(module.base_layer).stand_in(module)
    for owner, wrappers in bare.items():
        if on_tokens(owner):
            stand_in = _Experts(owner) if grouped.fits(owner) else _Linear(owner)
            for wrapper in wrappers:
                # What peft enters around the owner's forward pass.
                wrapper._activate_lora = partial(stand_in.activate, wrapper)


def _is_plain(layer: Any) -> bool:
    """Whether a LoRA layer of peft around a linear one adds scale B A x, and no more."""
    return (
        _is_linear(layer.base_layer)
        and not layer.base_layer.weight.requires_grad
        and not layer.fan_in_fan_out
        and [*layer.lora_A] == [NAME]
        and NAME not in layer.lora_variant
        and isinstance(layer.lora_dropout[NAME], nn.Identity)
        and layer.lora_B[NAME].bias is None
    )


class _OnTokens(ABC):
    """Stands in for a module's forward pass; peft decides, as ever, when an adapter takes part."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._plain = owner, owner.forward
        self._active: dict[str, Any] = {}
        owner.forward = self.forward

    @contextlib.contextmanager
    def activate(self, wrapper: Any, adapters: Sequence[str]) -> Iterator[None]:
        """Within it, a wrapper of peft's takes part if its adapter is among those."""
        name = getattr(wrapper, "parameter_name", "weight")
        if NAME in adapters:
            self._active[name] = wrapper
        try:
            yield
        finally:
            self._active.pop(name, None)

    @abstractmethod
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """What the owner computes, with the adapters that are active."""


class _Linear(_OnTokens):
    def stand_in(self, layer: Any) -> None:
        """Does the work of a LoRA layer of peft around the owner too."""
        by_peft: Callable[..., torch.Tensor] = layer.forward

        def forward(x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
            if layer.disable_adapters or layer.merged or others or named:
                return by_peft(x, *others, **named)
            with self.activate(layer, layer.active_adapters):
                y: torch.Tensor = layer.base_layer(x)
            return y

        layer.forward = forward

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """See _OnTokens; [..., I] to [..., O]."""
        y: torch.Tensor
        if "weight" in self._active:
            layer = self._active["weight"]
            a_RI, b_OR = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            weight_OI, bias_O = self._owner.weight, self._owner.bias
            y = _Product.apply(x, weight_OI, bias_O, a_RI, b_OR, layer.scaling[NAME])  # type: ignore[no-untyped-call]
        else:
            y = self._plain(x)
        return y


class _Product(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with a frozen W; of 16-bit inputs, all in 16 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.shape, ctx.scale = x.shape, scale
        ctx.dtypes = [None if given is None else given.dtype for given in (x, a_RI, b_OR, bias_O)]
        x_NI, weight_OI, a_RI, b_OR = (t.to(dtype) for t in (x.flatten(0, -2), weight_OI, a_RI, b_OR))
        h_NR = (x_NI @ a_RI.T).mul_(scale)
        y_NO = F.linear(x_NI, weight_OI, None if bias_O is None else bias_O.to(dtype)).addmm_(h_NR, b_OR.T)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, h_NR)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, h_NR = ctx.saved_tensors
        of_x, of_a, of_b, of_bias = ctx.dtypes
        grad_NO = grad.flatten(0, -2)
        grad_h_NR = (grad_NO @ b_OR).mul_(ctx.scale)
        grad_x = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OI).addmm_(grad_h_NR, a_RI).view(ctx.shape).to(of_x)
        if ctx.needs_input_grad[2]:
            grad_bias_O = grad_NO.sum(0, dtype=torch.float32).to(of_bias)
        return grad_x, None, grad_bias_O, (grad_h_NR.T @ x_NI).to(of_a), (grad_NO.T @ h_NR).to(of_b), None


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
