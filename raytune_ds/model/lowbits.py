"""Number formats of few bits: a tensor to one flat tensor of bytes, scales included, and back.

That all of a quantised parameter is one ordinary tensor of bytes is what lets every engine hand it out, shard it and
gather it as it does any other. The arithmetic is bitsandbytes' and torchao's.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from raytune_ds.errors import UserError


class LowBits(ABC):
    """One format."""

    package: str
    """What it needs, and the extra of ours that brings it."""
    extra: str

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """What a tensor of that shape takes."""

    @abstractmethod
    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """A float tensor as bytes: uint8, one-dimensional, on the same device. The same values give the same bytes."""

    @abstractmethod
    def unpack(self, packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What `pack` has left of the values."""


class Nf4(LowBits):
    """QLoRA's 4-bit NormalFloat with double quantisation: 0.516 bytes a value, scales of 64 values in 8 bits each.

    The bytes are those of bitsandbytes for the whole tensor; it is quantised piece by piece because on a CPU
    bitsandbytes takes sixteen bytes a value on the way.
    """

    package, extra = "bitsandbytes", "quantization"
    BLOCK, NESTED = 64, 256
    _PIECE = 1 << 20

    def nbytes(self, shape: Sequence[int]) -> int:
        """See LowBits."""
        codes, scales, nested = self._sizes(shape)
        return codes + scales + 4 * (nested + 1)

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        scales = -(-math.prod(shape) // self.BLOCK)
        return -(-math.prod(shape) // 2), scales, -(-scales // self.NESTED)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """See LowBits."""
        from bitsandbytes import functional as bnb

        pieces = [
            bnb.quantize_4bit(piece, blocksize=self.BLOCK, quant_type="nf4")
            for piece in values.reshape(-1).split(self._PIECE)
        ]
        codes = torch.cat([piece.view(-1) for piece, _ in pieces])
        absmax = torch.cat([state.absmax for _, state in pieces])
        offset = absmax.mean()
        scales, state = bnb.quantize_blockwise(absmax - offset, blocksize=self.NESTED)
        return _joined(codes, scales, state.absmax, offset.view(1))

    def unpack(self, packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See LowBits."""
        from bitsandbytes import functional as bnb

        codes, scales, nested = self._sizes(shape)
        # A clone is aligned, whatever the engine has gathered the bytes into.
        floats = packed[codes + scales :].clone().view(torch.float32)
        state = bnb.QuantState(
            absmax=packed[codes : codes + scales],
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=self.BLOCK,
            code=None,
            quant_type="nf4",
            offset=floats[nested],
            state2=bnb.QuantState(
                absmax=floats[:nested],
                blocksize=self.NESTED,
                code=_dynamic_map(packed.device),
                dtype=torch.float32,
            ),
        )
        return bnb.dequantize_4bit(packed[:codes].view(-1, 1), state).view(shape)


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    return bnb.create_dynamic_map().to(device)


class Int8(LowBits):
    """LLM.int8()'s integers with a scale for each row: 1 byte a value. Activations are not quantised."""

    package, extra = "bitsandbytes", "quantization"

    def nbytes(self, shape: Sequence[int]) -> int:
        """See LowBits."""
        return math.prod(shape) + 4 * math.prod(shape[:-1])

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """See LowBits."""
        from bitsandbytes import functional as bnb

        # Through float16, as bitsandbytes does.
        integers, scales, _ = bnb.int8_vectorwise_quant(values.reshape(-1, values.shape[-1]).half())
        # A row of zeros has no scale to divide by.
        return _joined(torch.where(scales[:, None] > 0, integers, 0).view(-1), scales)

    def unpack(self, packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See LowBits."""
        from bitsandbytes import functional as bnb

        size = math.prod(shape)
        integers = packed[:size].view(torch.int8).view(-1, shape[-1])
        scales = packed[size:].clone().view(torch.float32)
        return bnb.int8_vectorwise_dequant(integers, scales).to(dtype).view(shape)


class Fp8(LowBits):
    """torchao's weight-only float8 (e4m3) with a scale for each row: 1 byte a value."""

    package, extra = "torchao", "torchao"

    def nbytes(self, shape: Sequence[int]) -> int:
        """See LowBits."""
        return math.prod(shape) + 4 * math.prod(shape[:-1])

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """See LowBits."""
        from torchao.quantization import Float8Tensor, PerRow

        rows = values.reshape(-1, values.shape[-1])
        # A row of zeros has no scale to divide by.
        held = Float8Tensor.from_hp(rows, granularity=PerRow(), hp_value_lb=1e-12)
        return _joined(held.qdata.view(torch.uint8).view(-1), held.scale.view(-1))

    def unpack(self, packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See LowBits."""
        from torchao.quantization import Float8Tensor

        size, columns = math.prod(shape), shape[-1]
        values = packed[:size].view(torch.float8_e4m3fn).view(-1, columns)
        scales = packed[size:].clone().view(torch.float32).view(-1, 1)
        return Float8Tensor(values, scales, [1, columns], dtype=dtype).dequantize().view(shape)


class Int4(LowBits):
    """torchao's affine 4-bit integers, a scale and a zero point for each group of a row: 0.54 to 0.66 bytes a value."""

    package, extra = "torchao", "torchao"

    def nbytes(self, shape: Sequence[int]) -> int:
        """See LowBits."""
        size = math.prod(shape)
        return -(-size // 2) + 5 * (size // self._group(shape))

    def _group(self, shape: Sequence[int]) -> int:
        return next((size for size in (128, 64, 32) if shape[-1] % size == 0), shape[-1])

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """See LowBits."""
        from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

        groups = values.reshape(-1, self._group(values.shape))
        block = (1, groups.shape[1])
        scale, zero = choose_qparams_affine(
            groups,
            MappingType.ASYMMETRIC,
            block,
            torch.uint8,
            0,
            15,
            scale_dtype=torch.float32,
            zero_point_dtype=torch.uint8,
        )
        codes = quantize_affine(groups, block, scale, zero, torch.uint8, 0, 15).view(-1)
        if len(codes) % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])
        return _joined(codes[::2] << 4 | codes[1::2], zero.view(-1), scale.view(-1))

    def unpack(self, packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See LowBits."""
        from torchao.quantization import dequantize_affine

        size, group = math.prod(shape), self._group(shape)
        half, number = -(-size // 2), size // group
        codes = torch.stack([packed[:half] >> 4, packed[:half] & 15], dim=1).view(-1)[:size].view(-1, group)
        zero = packed[half : half + number]
        scale = packed[half + number :].clone().view(torch.float32)
        made = dequantize_affine(codes, (1, group), scale, zero, torch.uint8, 0, 15, output_dtype=dtype)
        return made.view(shape)


def _joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts])


_FORMATS: dict[str, Any] = {"nf4": Nf4, "int8": Int8, "fp8": Fp8, "int4": Int4}


@cache
def low_bits(name: str) -> LowBits:
    """The format of that `model.quantization`.

    Raises:
        UserError: its package is not installed.
    """
    made: LowBits = _FORMATS[name]()
    if importlib.util.find_spec(made.package) is None:
        raise UserError(
            f"model.quantization = {name}: {made.package} is not installed; pip install 'raytune_ds[{made.extra}]'"
        )
    return made
