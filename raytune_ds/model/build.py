"""The module that is trained, without weights yet, and where each of them comes from.

An engine decides which part of them lives in which process, and reads that part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import adapters, kernels, lowrank, quantize
from raytune_ds.model.allocation import RankAllocation, allocation_of
from raytune_ds.model.initial import Initial, adapted
from raytune_ds.model.load import hold_in, own_attention, packed_attention, parts, runs_on_packs, skeleton
from raytune_ds.model.packed import PackedLM
from raytune_ds.model.weights import Read, Weights, fill_buffers, locate, open_weights


@dataclass(frozen=True)
class Built:
    """A model to train.

    Attributes:
        module: its parameters have shapes and dtypes only (those of an adapter may be real, but count for nothing);
            its buffers are real.
        read: the initial values of the parameters of `module`.
        blocks: the transformer's layers, the units in which an engine may gather parameters.
        base: the Hugging Face model inside.
        trained: the shape of each trained parameter of `module`.
        lr_scales: factors of the learning rate of some of them.
        allocation: gives up ranks of the adapter as training goes on, where it is of that kind.
    """

    module: PackedLM
    read: Read
    blocks: tuple[nn.Module, ...]
    base: PreTrainedModel
    trained: Mapping[str, torch.Size]
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    allocation: RankAllocation | None = None

    @property
    def trainable(self) -> int:
        """Elements that are trained."""
        return sum(shape.numel() for shape in self.trained.values())

    @property
    def can_recompute(self) -> bool:
        """Whether the model's code can make activations anew."""
        return bool(self.base.supports_gradient_checkpointing)

    def recompute(self, depth: str) -> None:
        """Makes activations anew in the backward pass instead of keeping them.

        Args:
            depth: none; full: in every layer; every-n: in each n-th layer, the first among them.

        Raises:
            UserError: the model's code can't.
        """
        if depth == "none":
            self.base.activation_checkpointing_disable()
            return
        if not self.can_recompute:
            raise UserError(
                f"train.activation_checkpointing = {depth}: this model's code can't recompute activations; set none."
            )
        # ZeRO-3 frees parameters once they are used, which torch's check takes for a recomputation that differs.
        self.base.activation_checkpointing_enable(
            {"use_reentrant": False, "determinism_check": "none"},
            every_n_layers=1 if depth == "full" else int(depth.removeprefix("every-")),
        )
        # Only the reentrant kind needs a gradient of the embeddings, and that is work for the first layer.
        self.base.disable_input_require_grads()


def build(
    config: ModelConfig,
    adapter: AdapterConfig,
    seed: int,
    dtype: torch.dtype,
    trained_dtype: torch.dtype,
    *,
    autocast: bool = True,
    revision: str | None = None,
    initial: Initial | None = None,
    device: torch.device | None = None,
) -> Built:
    """What a config trains.

    Args:
        config: names the model.
        adapter: what of it is trained.
        seed: of the adapter's initial weights, the same in every process.
        dtype: what is computed in, and what frozen parameters are held in.
        trained_dtype: what trained parameters are held in.
        autocast: parameters are computed with in `dtype` whatever they are held in.
        revision: the commit of a model of the hub.
        initial: what the adapter begins with, where that is not drawn.
        device: quantizes, where `config.quantization` asks for it; the CPU by default.

    Raises:
        UserError: the model can't be loaded, or a target matches nothing.
    """
    end_to_end = runs_on_packs(config)
    attention = packed_attention(config) if end_to_end else own_attention(config)
    base = skeleton(config, attention, kernels.experts_of(config.experts_implementation))
    weights = open_weights(locate(config, revision), base)
    fill_buffers(base, weights)
    hold_in(base, dtype)
    decoder, _ = parts(base)
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    torch.manual_seed(seed)
    packings = quantize.packings(base, config.quantization).values()
    ready = adapted(base, adapter, trained_dtype, initial)
    lowrank.compute_on_tokens(ready)
    head = adapters.trained_part(base.get_output_embeddings())
    module = PackedLM(ready, decoder, head, dtype, autocast, end_to_end)
    _keep_routers_precise(base)
    read = _Initial(module, names, weights, initial, adapter.changes_base)
    return Built(
        module=module,
        read=quantize.PackedWeights(read, quantize.hold(module, packings), device),
        blocks=_blocks(base),
        base=base,
        trained={name: p.shape for name, p in module.named_parameters() if p.requires_grad},
        lr_scales=_lr_scales(module, adapter),
        allocation=allocation_of(module),
    )


def _lr_scales(module: nn.Module, adapter: AdapterConfig) -> dict[str, float]:
    """LoRA+ (arXiv:2402.12354): B learns faster than A."""
    if adapter.loraplus_lr_ratio is None:
        return {}
    return {name: adapter.loraplus_lr_ratio for name, _ in module.named_parameters() if ".lora_B." in name}


class _Initial:
    """What a parameter of the module begins with: the base model's weight, or the adapter's own."""

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[int, str],
        weights: Weights,
        initial: Initial | None,
        taken_out: bool,
    ) -> None:
        """`taken_out`: what the adapter begins with is missing from the base weights."""
        # By identity: peft renames the modules that it wraps, but keeps their parameters.
        self._weights = weights
        self._base = {name: names[id(p)] for name, p in module.named_parameters() if id(p) in names}
        whole = adapters.trained_whole(module)
        if initial is None:
            self._base |= {name: names[id(original)] for name, original in whole.items()}
        self._fresh = {n: p.detach().clone() for n, p in module.named_parameters() if n not in self._base}
        self._taken = adapters.deltas(module) if taken_out else {}

    def __call__(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Read."""
        if name in self._fresh:
            return self._fresh[name].reshape(-1)[start:stop]
        value = self._weights(self._base[name], start, stop)
        if name in self._taken:
            value = value.float() - self._taken[name](start, stop)
        return value


def _keep_routers_precise(base: PreTrainedModel) -> None:
    """Takes routers out of autocast: they ask for float32 themselves, as when served, and it would overrule them.

    A router is what has a matrix of its own and is neither a linear layer nor an embedding.
    """
    for module in base.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
        if matrices and not isinstance(module, nn.Linear | nn.Embedding):
            for device in ("cpu", "cuda"):
                module.forward = torch.autocast(device, enabled=False)(module.forward)


def _blocks(base: PreTrainedModel) -> tuple[nn.Module, ...]:
    kinds = set(base._no_split_modules or ())
    return tuple(module for module in base.modules() if type(module).__name__ in kinds)
