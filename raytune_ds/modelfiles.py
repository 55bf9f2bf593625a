"""The weight files of a Hugging Face model, written one by one and read back.

No process needs room for more than a few times one file (1 GiB, or the largest parameter). What was written is read
back, by the rules by which transformers loads it, before it is called written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from raytune_ds import storage
from raytune_ds.errors import UserError
from raytune_ds.model.weights import Weights
from raytune_ds.tensorfile import TensorFile
from raytune_ds.world import World

T = TypeVar("T")

FILE_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"


class ExportError(Exception):
    """What was written is not what it was made from."""


@dataclass(frozen=True)
class Compared:
    """A tensor and what was read back of it.

    Attributes:
        name: in memory.
        problem: what is wrong; None if nothing is.
        unchanged: whether it was trained, and equals what training began with.
    """

    name: str
    problem: str | None
    unchanged: bool = False


class Tensors(Protocol):
    """What goes into the files, by its name in memory."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of all of them, in the order in which they are written."""

    def dtype(self, name: str) -> torch.dtype:
        """On disk."""

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor as it is saved."""

    def compare(self, name: str, saved: Weights) -> Compared:
        """A tensor with what was read back."""


def write_weights(
    target: str,
    model: PreTrainedModel,
    tensors: Tensors,
    world: World,
    on_file: Callable[[int], None] = lambda nbytes: None,
) -> list[Compared]:
    """Writes the weight files and their index, and compares them. A collective: the ranks write side by side.

    Args:
        target: a folder anywhere.
        model: gives names, shapes and conversions; its weights are not looked at.
        tensors: what is written.
        world: the ranks.
        on_file: hears of the bytes of each file of this rank, once it is written.

    Raises:
        ExportError: they can't be written, or what is read back differs.
    """
    plan = list(_files(tensors.shapes, {name: tensors.dtype(name) for name in tensors.shapes}))
    names = [_file_name(number, len(plan)) for number in range(len(plan))]
    written: dict[str, list[str]] = {}
    sizes: list[int] = []

    def write_mine() -> None:
        for number in range(world.rank, len(plan), world.size):
            entries = revert_weight_conversion(model, {name: tensors(name) for name in plan[number]})
            content = safetensors.torch.save({k: _own(v) for k, v in entries.items()}, {"format": "pt"})
            storage.write_bytes(f"{target}/{names[number]}", content)
            written[names[number]] = list(entries)
            sizes.append(sum(v.nbytes for v in entries.values()))
            on_file(sizes[-1])

    on_all(world, write_mine)
    parts = world.gather((written, sum(sizes)))
    where = {key: file for files, _ in parts for file, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": sum(size for _, size in parts)}, "weight_map": where}
    if len(plan) > 1:
        on_main(world, lambda: storage.write_json(f"{target}/{INDEX}", index))
    saved = Weights([TensorFile(f"{target}/{name}") for name in names], target, model)
    mine = sorted(tensors.shapes)[world.rank :: world.size]
    compared = on_all(world, lambda: [tensors.compare(name, saved) for name in mine])
    found = [result for results in world.gather(compared) for result in results]
    if problems := [result.problem for result in found if result.problem]:
        raise ExportError("; ".join(problems[:3]))
    return found


def num_bytes(tensors: Tensors) -> int:
    """Of all files together, near enough."""
    return sum(math.prod(shape) * tensors.dtype(name).itemsize for name, shape in tensors.shapes.items())


def on_all(world: World, action: Callable[[], T]) -> T:
    """Does something on all ranks; ExportError on all if it fails on one."""
    try:
        return world.together(action, (OSError, ExportError, SafetensorError))
    except UserError as error:
        raise ExportError(str(error)) from error


def on_main(world: World, action: Callable[[], None]) -> None:
    """Does something on rank 0; ExportError on all if it fails."""
    on_all(world, action if world.is_main else lambda: None)


def save_configs(target: Path, base: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """config.json, generation_config.json, and the code of a model that comes with its own.

    Args:
        target: a local folder.
        base: whose config it is.
        folder: of the base model.
        dtype: of the weights.
    """
    config = base.config
    config.architectures, config.dtype = [type(base).__name__], dtype
    for ours in ("fp8_block_size", "grown_from"):
        if hasattr(config, ours):
            delattr(config, ours)
    config.save_pretrained(target)
    if (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder).save_pretrained(target)
    for code in folder.glob("*.py"):
        shutil.copy(code, target)


def _files(shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]) -> Iterator[list[str]]:
    """Tensors gathered to files of FILE_BYTES, or of one tensor where that is larger."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtypes[name].itemsize
        if names and size + nbytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares its memory with no other, as safetensors wants it."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
