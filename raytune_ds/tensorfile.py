"""One safetensors file on any filesystem, read by ranges: a reader needs memory for what it asks for and no more.

safetensors' own reader maps local files into memory, where every page that was touched counts for the process, and
reads files elsewhere only as a whole.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from typing import Any

import torch

from raytune_ds import storage

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFile:
    """A safetensors file. Nothing is read before it is asked for, nor stays open: a checkpoint may have thousands."""

    def __init__(self, path: str) -> None:
        """`path` is any that `storage` opens."""
        self.path = path

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begin, and the entry of each tensor (https://github.com/huggingface/safetensors#format).

        Raises:
            OSError: it can't be read.
            ValueError: it is no safetensors file.
        """
        with storage.open_file(self.path) as file:
            size = file.size()
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"{self.path}: is no safetensors file, or cut off")
            entries = json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise ValueError(f"{self.path}: is no safetensors file")
        entries.pop("__metadata__", None)
        if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size - 8 - length:
            raise ValueError(f"{self.path}: is cut off, or longer than it should be")
        return 8 + length, entries

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(entry["shape"]) for name, entry in self._header[1].items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return _DTYPES[self._header[1][name]["dtype"]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order, one-dimensional.

        Raises:
            OSError: the file can't be read, or ends too early.
            ValueError: there are no such elements.
        """
        data, entries = self._header
        dtype, numel = self.dtype(name), math.prod(entries[name]["shape"])
        stop = numel if stop is None else stop
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"{self.path}: {name} has {numel} elements, not {start} to {stop}")
        elements = torch.empty(stop - start, dtype=dtype)
        if elements.numel():
            with storage.open_file(self.path) as file:
                file.seek(data + entries[name]["data_offsets"][0] + start * dtype.itemsize)
                buffer = elements.view(torch.uint8).numpy()
                if file.readinto(buffer) != len(buffer):
                    raise OSError(f"{self.path}: ends too early")
        return elements
