"""What a model is made of, by its structure: which of its matrices belong to attention, to experts, to routers ...

No architecture is known by name. What tells: fused routed experts are three-dimensional, and what lies beside them in
the same block is shared experts and a router; what lies below a module whose class is called an attention is attention;
an indexer only chooses what is attended to, without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

Part = Literal[
    "attention", "mlp", "shared-experts", "experts", "router", "indexer", "embedding", "head", "other"
]


@dataclass(frozen=True)
class Matrix:
    """A parameter of two dimensions or more, or several as one.

    Attributes:
        name: of the parameter, such as model.layers.0.mlp.up_proj.weight.
        owner: of the module that holds it.
        part: of the model.
        shape: of the parameter.
        is_linear: the owner is a linear layer that computes as torch's does.
    """

    name: str
    owner: str
    part: Part
    shape: torch.Size
    is_linear: bool

    @property
    def short(self) -> str:
        """The last part of the owner's name; of a bare parameter, its own."""
        return (self.owner if self.is_weight else self.name).rpartition(".")[2]

    @property
    def is_weight(self) -> bool:
        """Whether its owner is called after it, rather than holding several."""
        return self.name.endswith(".weight")

    @property
    def layer(self) -> int | None:
        """The number of the layer it is in, None outside of them."""
        return next((int(word) for word in self.name.split(".") if word.isdigit()), None)

    @property
    def num_experts(self) -> int:
        """How many matrices are in it: of fused experts, one each."""
        return self.shape[0] if len(self.shape) == 3 else 1


def anatomy(model: PreTrainedModel) -> tuple[Matrix, ...]:
    """All matrices of a model, each once; weights are not needed."""
    whole = {id(model.get_input_embeddings().weight): "embedding"}
    if (head := model.get_output_embeddings()) is not None:
        whole.setdefault(id(head.weight), "head")
    modules = dict(model.named_modules())
    blocks = _expert_blocks(modules)
    found = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        owner = name.rpartition(".")[0]
        part = whole.get(id(parameter)) or _part(name, owner, modules, blocks)
        plain = type(modules[owner]).forward is nn.Linear.forward and name.endswith(".weight")
        found.append(Matrix(name, owner, part, parameter.shape, plain))  # type: ignore[arg-type]
    return tuple(found)


def _expert_blocks(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Block of experts -> the module in it that holds the routed ones, fused or in a list."""
    fused = (name for name, m in modules.items() if any(p.ndim == 3 for p in m.parameters(recurse=False)))
    listed = (n for n, m in modules.items() if isinstance(m, nn.ModuleList) and n.endswith(".experts"))
    return {name.rpartition(".")[0]: name for name in (*fused, *listed)}


def _part(name: str, owner: str, modules: dict[str, nn.Module], blocks: dict[str, str]) -> Part:
    above = list(_above(owner))
    for block in above:
        if block in blocks:
            if blocks[block] in above:
                return "experts"
            # What the block holds itself scores experts; what lies deeper is computed for each token.
            is_own = owner.rpartition(".")[0] == block
            return "router" if is_own else "shared-experts"
    kinds = [type(modules[module]).__name__ for module in above]
    if any("Indexer" in kind for kind in kinds):
        return "indexer"
    if not isinstance(modules[owner], nn.Linear):
        return "other"
    return "attention" if any("Attention" in kind for kind in kinds) else "mlp"


def _above(owner: str) -> Iterator[str]:
    """A module's name and those of all that it lies in, from the inside out."""
    while owner:
        yield owner
        owner = owner.rpartition(".")[0]
