"""AdaLoRA's share of a training step: adapters that give up rank where little comes of it (arXiv:2303.10512).

Peft does the reckoning. It wants to see gradients after each update, and a penalty in the loss that it would add in a
forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Smoothed importance and its uncertainty: what peft's allocator remembers of each parameter of the adapter.
REMEMBERED = {"importance": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}


class RankAllocation:
    """Which ranks of an AdaLoRA adapter are kept."""

    def __init__(self, module: nn.Module, adalora: Any) -> None:
        """`adalora` is peft's model within `module`, which is what is trained."""
        self._adalora = adalora
        ids = {id(p): name for name, p in adalora.model.named_parameters() if "lora_" in name}
        parameters = module.named_parameters()
        self._names = {name: ids[id(p)] for name, p in parameters if id(p) in ids and p.requires_grad}
        held = dict(adalora.model.named_parameters())
        self._shapes = {name: held[inner].shape for name, inner in self._names.items()}

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of what has to be kept in a checkpoint, by name."""
        return {f"{kind}/{name}": shape for kind in REMEMBERED for name, shape in self._shapes.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """What has to be kept, by name; zeros before the first step."""
        found = {}
        for kind, attribute in REMEMBERED.items():
            kept = getattr(self._adalora.rankallocator, attribute)
            for name, inner in self._names.items():
                found[f"{kind}/{name}"] = kept.get(inner, torch.zeros(self._shapes[name]))
        return found

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes it back. Ranks that were given up have a singular value of zero."""
        allocator, parameters = self._adalora.rankallocator, dict(self._adalora.model.named_parameters())
        for kind, attribute in REMEMBERED.items():
            kept = {inner: state[f"{kind}/{name}"] for name, inner in self._names.items()}
            setattr(allocator, attribute, kept)
        allocator.ipt = {inner: torch.zeros_like(parameters[inner]) for inner in self._names.values()}
        self._config.rank_pattern = kept_ranks({n: p for n, p in parameters.items() if n in allocator.ipt})

    def add_penalty(self) -> None:
        """Adds the gradient of the penalty on directions that are not orthogonal; once a step, on one rank."""
        weight = self._config.orth_reg_weight
        parameters = dict(self._adalora.model.named_parameters())
        pairs = [parameters[n] for n in self._names.values() if "lora_A" in n or "lora_B" in n]
        # The paper's equation 6; a rank is along the shorter axis.
        squares = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in pairs]
        penalty = sum(
            (torch.linalg.norm(s - torch.eye(len(s), device=s.device)) for s in squares), torch.zeros(())
        )
        (weight * penalty / len(pairs)).backward()

    def allocate(self, updates: int) -> None:
        """Gives up ranks after that many updates; gradients are still those of the last one."""
        self._adalora.update_and_allocate(updates)

    @property
    def _config(self) -> Any:
        return self._adalora.peft_config[self._adalora.trainable_adapter_name]


def kept_ranks(parameters: Mapping[str, torch.Tensor]) -> dict[str, list[bool]] | None:
    """Name of each layer's singular values -> which are kept; None where nothing was given up yet."""
    values = {name: tensor for name, tensor in parameters.items() if ".lora_E." in name}
    kept = {name: (tensor.detach() != 0).view(-1).tolist() for name, tensor in values.items()}
    return kept if any(not all(ranks) for ranks in kept.values()) else None


def allocation_of(module: nn.Module) -> RankAllocation | None:
    """That of what is trained; None where it is no AdaLoRA adapter."""
    from peft.tuners.adalora import AdaLoraModel

    found = next((part for part in module.modules() if isinstance(part, AdaLoraModel)), None)
    return None if found is None else RankAllocation(module, found)
