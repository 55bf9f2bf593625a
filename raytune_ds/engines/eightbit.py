"""bitsandbytes' AdamW with moments in 8 bits, over the part of each trained parameter that a rank keeps.

To the rest of the house the moments are float32, as in every checkpoint: they are dequantised when they are handed out
and quantised when they are taken back, which is exact for what was handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from raytune_ds.compatible import EIGHT_BIT, PAGED
from raytune_ds.config import TrainConfig
from raytune_ds.engines import MOMENTS, StepResult
from raytune_ds.engines.adamw import AdamW, adamw_settings, groups_of, local

BLOCK = 256  # of bitsandbytes
# Its names of a moment's values, their scales and the map of values to bytes.
_STATES = dict(zip(MOMENTS, (("state1", "absmax1", "qmap1"), ("state2", "absmax2", "qmap2")), strict=True))


def adamw_of(
    parameters: Mapping[str, nn.Parameter],
    config: TrainConfig,
    lr_scales: Mapping[str, float] = MappingProxyType({}),
) -> AdamW:
    """The AdamW that `train.optim` names; see AdamW for the rest."""
    return (EightBitAdamW if config.optim in EIGHT_BIT else AdamW)(parameters, config, lr_scales)


class EightBitAdamW(AdamW):
    """See the module."""

    def _make(self, config: TrainConfig, lr_scales: Mapping[str, float]) -> torch.optim.Optimizer:
        """Over plain tensors, which share the memory of the parameters' parts."""
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

        parts = {name: nn.Parameter(local(p.detach())) for name, p in self.parameters.items()}
        self._parts = {name: part for name, part in parts.items() if part.numel()}
        whole = {part: self.parameters[name] for name, part in self._parts.items()}
        settings = adamw_settings(config)
        del settings["fused"]
        groups = groups_of(self._parts, config.weight_decay, lr_scales, ndim=lambda part: whole[part].ndim)
        made: Any = (PagedAdamW8bit if config.optim in PAGED else AdamW8bit)(
            groups or [{"params": [], "lr_scale": 1.0}], **settings
        )
        for group_number, group in enumerate(made.param_groups):
            for number, part in enumerate(group["params"]):
                made.init_state(group, part, group_number, number)
        return made

    def apply(
        self, gradients: Iterable[torch.Tensor], grad_norm: float, lr: float, wanted: bool
    ) -> StepResult:
        """See AdamW."""
        for name, part in self._parts.items():
            gradient = self.parameters[name].grad
            assert gradient is not None
            part.grad = local(gradient)
        return super().apply(gradients, grad_norm, lr, wanted)

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """See AdamW; the moments are copies."""
        for name, parameter in self.parameters.items():
            yield "model", name, local(parameter.detach())
            for moment in MOMENTS:
                yield moment, name, self._moment(moment, name)

    def load(self, write: Callable[[torch.Tensor, str, str], None], updates: int) -> None:
        """See AdamW."""
        for kind, name, tensor in self.state():
            write(tensor, kind, name)
            if kind in MOMENTS and name in self._parts:
                self._hold(kind, name, tensor)
        for state in self._optimizer.state.values():
            state["step"] = updates

    def _moment(self, moment: str, name: str) -> torch.Tensor:
        from bitsandbytes import functional as bnb

        if name not in self._parts:
            return torch.empty_like(local(self.parameters[name].detach()))
        state, (values, scales, codes) = self._optimizer.state[self._parts[name]], _STATES[moment]
        if codes not in state:  # bitsandbytes leaves small ones in float32
            return state[values].clone()
        made = bnb.dequantize_blockwise(
            state[values], absmax=state[scales], code=state[codes], blocksize=BLOCK
        )
        return made.add_(0.0)  # a block of zeros is one of negative zeros before the first step

    def _hold(self, moment: str, name: str, tensor: torch.Tensor) -> None:
        state, (values, scales, codes) = self._optimizer.state[self._parts[name]], _STATES[moment]
        if codes not in state:
            state[values].copy_(tensor)
            return
        made, how = _as_bytes(tensor, state[codes])
        state[values].copy_(made)
        state[scales].copy_(how)


def _as_bytes(values: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values as places in `codes`, and the scale of each block; what was made of bytes becomes the same bytes.

    bitsandbytes' own would take the largest value of a block for its scale. But the code of the largest negative one is
    not -1, so that a block which it is the largest of would shrink each time. The scale is the one that gives most of a
    block's values back.
    """
    flat = values.reshape(-1)
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    lowest = codes[0].abs()
    guesses = [scale]
    if codes[0] < 0:
        guess = scale / lowest
        guesses += [guess, guess.nextafter(torch.zeros_like(guess)), guess.nextafter(guess + 1)]
    middles = (codes[1:] + codes[:-1]) / 2
    best = torch.full_like(scale, -1.0)
    places = torch.zeros_like(blocks, dtype=torch.uint8)
    for guess in guesses:
        made = torch.bucketize(blocks / guess.clamp(min=torch.finfo(torch.float32).tiny)[:, None], middles)
        given_back = (codes[made] * guess[:, None] == blocks).sum(1).float()
        better = given_back > best
        places = torch.where(better[:, None], made.to(torch.uint8), places)
        scale, best = torch.where(better, guess, scale), torch.where(better, given_back, best)
    return places.view(-1)[: len(flat)].view(values.shape), scale
