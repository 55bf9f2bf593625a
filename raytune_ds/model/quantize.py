"""Frozen weights held in few bits: which of a model's, how a module computes with them, and reading them.

A quantised parameter is a flat tensor of bytes (`model/lowbits`) behind one of torch's parametrizations: whoever asks
the module for its weight gets the values back, for as long as they are in use. Nobody keeps them: where autograd would
save them for the backward pass, they are made again. So linear layers and fused routed experts are alike, peft's layers
and torch's functions see plain modules, and engines see a frozen parameter of bytes that they read, hand out, shard and
gather as they do any other.

Of what peft's `prepare_model_for_kbit_training` does, nothing is left to do: norms compute in float32 by themselves and
would gain nothing from being held in it, for published weights are bfloat16; head and embeddings keep their dtype; and
activation checkpointing, which is not of the reentrant kind, needs no gradient of the input.

Merging an adapter into a quantised module changes nothing, as there is no weight to write to: merge into the base
model's files, or into what `dequantised` reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from raytune_ds.model.lowbits import LowBits, low_bits
from raytune_ds.model.weights import Read


@dataclass(frozen=True)
class Packing:
    """How one parameter is held.

    Attributes:
        parameter: without values.
        bits: the format.
    """

    parameter: nn.Parameter
    bits: LowBits

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        """That it is computed with in."""
        return self.parameter.dtype

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.bits.nbytes(self.shape)

    def pack(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The parameter's values, in any float dtype, as bytes on the CPU; `device` does the work."""
        return self.bits.pack(values.to(device, self.dtype).view(self.shape)).cpu()

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The values that are computed with."""
        return self.bits.unpack(packed, self.shape, self.dtype)


def packings(base: PreTrainedModel, quantization: str) -> dict[str, Packing]:
    """How those parameters of a base model are held that are quantised, by name.

    These are the linear layers but for the output head, and the fused routed experts. Embeddings, norms, biases and
    routers are not, nor is what the architecture keeps in float32.

    Args:
        base: as it is built, before an adapter is put around it; weights are not needed. Its parameters have the dtype
            that is computed in.
        quantization: as `model.quantization`.

    Raises:
        UserError: the format's package is not installed.
    """
    if quantization == "none":
        return {}
    bits, kept = low_bits(quantization), tuple(base._keep_in_fp32_modules_strict or ())
    return {
        name: Packing(parameter, bits)
        for name, parameter in _quantisable(base)
        if not any(part in name for part in kept)
    }


def _quantisable(base: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    head = base.get_output_embeddings()
    tied = {id(base.get_input_embeddings().weight)}
    for prefix, module in base.named_modules():
        if module is head:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, nn.Linear) and own == "weight"
            # Convolutions have kernels of three dimensions too.
            are_experts = parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if (is_matrix or are_experts) and id(parameter) not in tied:
                yield f"{prefix}.{own}", parameter


def hold(module: nn.Module, packings: Iterable[Packing]) -> dict[str, Packing]:
    """Puts bytes, which are not there yet, in place of the parameters of a module without weights.

    Args:
        module: the base model, or what has been made of it by an adapter; what is trained stays as it is.
        packings: of parameters that are among the module's.

    Returns:
        How each parameter of the module is held that is bytes now, by its name there.
    """
    by_id = {id(packing.parameter): packing for packing in packings}
    held = {}
    for prefix, owner in [*module.named_modules()]:
        chosen = {
            own: by_id[id(parameter)]
            for own, parameter in owner.named_parameters(recurse=False)
            if id(parameter) in by_id and not parameter.requires_grad
        }
        for own, packing in chosen.items():
            packed = torch.empty(packing.nbytes, dtype=torch.uint8, device="meta")
            setattr(owner, own, nn.Parameter(packed, requires_grad=False))
            parametrize.register_parametrization(owner, own, _Unpack(packing), unsafe=True)
            held[f"{prefix}.{_BEFORE}{own}{_BEHIND}"] = packing
        if chosen:
            _keep_nothing(owner, tuple(chosen))
    return held


_BEFORE, _BEHIND = "parametrizations.", ".original"


def plain_name(name: str) -> str:
    """What a parameter of a module was called before it became bytes."""
    return name.replace(_BEFORE, "").removesuffix(_BEHIND) if name.endswith(_BEHIND) else name


class _Unpack(nn.Module):
    """From bytes to values."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing = packing
        self._made: Callable[[], torch.Tensor | None] = lambda: None

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """The parameter that the owner computes with."""
        if packed.is_meta or isinstance(packed, FakeTensor):  # there are no bytes to look at
            values = torch.empty(self.packing.shape, dtype=self.packing.dtype, device=packed.device)
        else:
            values = self.packing.unpack(packed)
        self._made = weakref.ref(values)
        return values

    def has_made(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is made of the values of the last call, which are still there."""
        values = self._made()
        return values is not None and _place(values) == _place(tensor)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # not its address: of tensors without values it is always zero


def _keep_nothing(owner: nn.Module, own_names: Sequence[str]) -> None:
    """Lets a module's forward pass make each quantised weight once, and save none of them for the backward pass."""
    forward: Callable[..., Any] = owner.forward

    def pack(tensor: torch.Tensor) -> Any:
        for name in own_names:
            if _chain(owner, name)[0].has_made(tensor):
                return name, tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        name, size, stride, offset = saved
        values: torch.Tensor = getattr(owner, name)
        return values.as_strided(size, stride, offset)

    def lean(*args: Any, **kwargs: Any) -> Any:
        for name in own_names:
            if len(_chain(owner, name)) > 1:
                _name_for_peft(_chain(owner, name))
                # Peft has looked at it before its adapter was there, and another wrapper may have had that remembered.
                parametrize._cache.pop((id(owner), name), None)
        with parametrize.cached(), saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    owner.forward = lean


def _chain(owner: Any, name: str) -> Any:
    """What makes a parameter: ours first, and while an adapter of it is in use, peft's."""
    return owner.parametrizations[name]


def _name_for_peft(chain: Any) -> None:
    """Lets peft 0.21 take away what it has put on a quantised parameter: it looks for a class that it no longer takes.

    It would stay otherwise, and be added once more with every forward pass.
    """
    looked_for = _looked_for()
    if not isinstance(chain[-1], looked_for):
        chain[-1] = looked_for(chain[-1])


@cache
def _looked_for() -> type[nn.Module]:
    from peft.tuners.lora.layer import _LoraParameterProxy

    class Known(_LoraParameterProxy):
        """An adapter's part of a parameter, as a class that peft knows."""

        def __init__(self, proxy: nn.Module) -> None:
            super().__init__(None)
            self.proxy = proxy

        def forward(self, W: torch.Tensor) -> torch.Tensor:
            """See the proxy."""
            return self.proxy(W)

    return Known


# ----------------------------------------------------------------------------------------------- reading


class PackedWeights:
    """Reads a module's weights as they are held: bytes of those that are quantised. See Read.

    A quantised parameter is read and quantised whole, whatever range is asked for, and kept until the next is.
    """

    def __init__(
        self, weights: Read, held: Mapping[str, Packing], device: torch.device | None = None
    ) -> None:
        """`weights` by plain names, `held` by those that are asked for; `device` does the work, the CPU by default."""
        self._weights, self._held = weights, held
        self._device = device or torch.device("cpu")
        self._last: tuple[str, torch.Tensor] | None = None

    def __call__(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Read."""
        if name not in self._held:
            return self._weights(name, start, stop)
        return self._packed(name)[start:stop]

    def _packed(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is made
            packing = self._held[name]
            values = self._weights(plain_name(name), 0, packing.shape.numel())
            self._last = (name, packing.pack(values, self._device))
        return self._last[1]

    def values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a parameter as they are computed with: see `dequantised`."""
        if name not in self._held:
            return self._weights(name, start, stop)
        packed = self._packed(name).to(self._device)
        return self._held[name].unpack(packed).view(-1)[start:stop].cpu()


def dequantised(
    weights: Read, base: PreTrainedModel, quantization: str, device: torch.device | None = None
) -> Read:
    """Reads the base model as an adapter saw it in training: what was quantised is quantised and made values again.

    Args:
        weights: of the base model.
        base: its skeleton, held (`load.hold_in`) in what was computed in; quantised parameters come in that dtype.
        quantization: as `model.quantization`.
        device: does the work; the CPU by default.

    Raises:
        UserError: the format's package is not installed.
    """
    return PackedWeights(weights, packings(base, quantization), device).values


def logical_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """What the quantised parameters of a module stand for, by their names there."""
    return {
        f"{prefix}{_BEHIND}": chain[0].packing.shape
        for prefix, chain in module.named_modules()
        if isinstance(chain, parametrize.ParametrizationList) and isinstance(chain[0], _Unpack)
    }
