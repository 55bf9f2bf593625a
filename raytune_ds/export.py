"""What the user takes home: an adapter that peft loads, or a model that transformers loads.

It is made from a checkpoint, file by file, and not from the running model: no rank needs room for more than a few times
one file (1 GiB, or the largest parameter), and any checkpoint can be exported, whichever engine wrote it. What was
written is read back before it is called saved.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from raytune_ds import storage
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.checkpoint import Reader
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import initial
from raytune_ds.model.initial import TENSORS, Initial, as_plain_lora
from raytune_ds.model.load import hold_in, skeleton
from raytune_ds.model.weights import Weights, locate, open_weights
from raytune_ds.rundir import RunDir
from raytune_ds.tensorfile import TensorFile
from raytune_ds.world import World

T = TypeVar("T")

FILE_BYTES = 1 << 30
# Names in a checkpoint are those of the trained module, whose Hugging Face or peft model is its `model`.
_PREFIX = "model/model."


class ExportError(Exception):
    """What was written is not what is in the checkpoint."""


@dataclass(frozen=True)
class Final:
    """What was saved.

    Attributes:
        size: bytes of all its files.
        num_trained: tensors that were trained.
        unchanged: names of those that equal what training began with.
    """

    size: int
    num_trained: int
    unchanged: tuple[str, ...]


def save_final(
    run: RunDir,
    model: ModelConfig,
    adapter: AdapterConfig,
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    card: str,
    world: World,
    revision: str | None = None,
    seed: int = 0,
) -> Final:
    """Writes `final/` and reads it back. A collective: the ranks write and read side by side.

    Args:
        run: where it goes.
        model: the base model.
        adapter: what was trained of it.
        reader: of the checkpoint.
        tokenizer: saved along, chat template included.
        dtype: of a whole model's weights on disk; an adapter keeps float32.
        card: the model card.
        world: the ranks.
        revision: the commit of a base model of the hub.
        seed: that an adapter was drawn with.

    Raises:
        ExportError: it can't be written, or what is read back differs from the checkpoint.
        UserError: the base model can't be read any more.
    """
    base, folder, weights = world.together(lambda: _opened(model, revision), (UserError, OSError))
    # Object stores have no renaming: there the weights are written in place, before what makes them a model.
    staging = f"{run.path}/.final" if storage.is_local(run.path) else run.final

    def begin() -> None:
        storage.delete_dir(staging)
        storage.make_dir(staging)

    def finish() -> None:
        with _beside(staging) as local:
            if adapter.kind == "none":
                _save_configs(local, base, folder, dtype)
            tokenizer.save_pretrained(local)
            (local / "README.md").write_text(card, encoding="utf-8")
        if staging != run.final:
            storage.delete_dir(run.final)
            Path(storage.absolute(staging)).rename(storage.absolute(run.final))

    try:
        _main(world, begin)
        if adapter.kind == "none":
            unchanged = _save_model(staging, base, weights, reader, dtype, world)
        else:
            ready = world.together(lambda: _adapted(run, base, adapter, seed), (UserError, OSError))
            unchanged = _save_adapter(run, staging, adapter, ready, reader, world)
        _main(world, finish)
    except ExportError:
        if world.is_main:
            with contextlib.suppress(OSError):
                storage.delete_dir(staging)  # the room it takes may be what is missing
        raise
    num_trained = sum(name.startswith(_PREFIX) for name in reader.shapes)
    return Final(storage.size_of(run.final), num_trained, tuple(unchanged))


def _opened(model: ModelConfig, revision: str | None) -> tuple[PreTrainedModel, Path, Weights]:
    base = skeleton(model)
    folder = locate(model, revision)
    return base, folder, open_weights(folder, base)


def _all(world: World, action: Callable[[], T]) -> T:
    """Does something on all ranks; ExportError on all if it fails on one."""
    try:
        return world.together(action, (OSError, ExportError, SafetensorError))
    except UserError as error:
        raise ExportError(str(error)) from error


def _main(world: World, action: Callable[[], None]) -> None:
    """Does something on rank 0; ExportError on all if it fails."""
    _all(world, action if world.is_main else lambda: None)


@contextlib.contextmanager
def _beside(target: str) -> Iterator[Path]:
    """A local folder whose files are added to `target` afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="raytune-final-"))
    try:
        yield folder
        storage.upload_dir(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ----------------------------------------------------------------------------------------- whole models


def _save_model(
    target: str, base: PreTrainedModel, weights: Weights, reader: Reader, dtype: torch.dtype, world: World
) -> list[str]:
    """Writes the weight files and their index, and compares them with the checkpoint; returns what did not change."""
    hold_in(base, dtype)
    tensors = _Tensors(base, weights, reader)
    plan = list(_files(tensors.shapes, {name: tensors.dtype(name) for name in tensors.shapes}))
    names = [_file_name(number, len(plan)) for number in range(len(plan))]
    written: dict[str, list[str]] = {}
    sizes: list[int] = []

    def write_mine() -> None:
        for number in range(world.rank, len(plan), world.size):
            entries = revert_weight_conversion(base, {name: tensors(name) for name in plan[number]})
            content = safetensors.torch.save({k: _own(v) for k, v in entries.items()}, {"format": "pt"})
            storage.write_bytes(f"{target}/{names[number]}", content)
            written[names[number]] = list(entries)
            sizes.append(sum(v.nbytes for v in entries.values()))

    _all(world, write_mine)
    parts = world.gather((written, sum(sizes)))
    where = {key: file for files, _ in parts for file, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": sum(size for _, size in parts)}, "weight_map": where}
    if len(plan) > 1:
        _main(world, lambda: storage.write_json(f"{target}/model.safetensors.index.json", index))
    saved = Weights([TensorFile(f"{target}/{name}") for name in names], target, base)
    mine = sorted(tensors.shapes)[world.rank :: world.size]
    compared = _all(world, lambda: [tensors.compare(name, saved) for name in mine])
    found = [result for results in world.gather(compared) for result in results]
    if problems := [result.problem for result in found if result.problem]:
        raise ExportError("; ".join(problems[:3]))
    return sorted(result.name for result in found if result.unchanged)


@dataclass(frozen=True)
class _Compared:
    name: str
    problem: str | None
    unchanged: bool


class _Tensors:
    """What goes into a whole model: trained parameters of a checkpoint, buffers of the base model."""

    def __init__(self, base: PreTrainedModel, weights: Weights, reader: Reader) -> None:
        self._weights, self._reader = weights, reader
        parameters = dict(base.named_parameters())
        buffers = {name: buffer for name, buffer in base.named_buffers() if name in weights}
        self._like: dict[str, torch.Tensor] = {**parameters, **buffers}
        self.shapes = {name: tensor.shape for name, tensor in self._like.items()}
        self._trained = set(parameters)

    def dtype(self, name: str) -> torch.dtype:
        """On disk."""
        return self._like[name].dtype

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor as it is saved."""
        like = self._like[name]
        if name in self._trained:
            return self._reader.whole(_PREFIX + name).to(like.dtype)
        return self._weights(name, 0, like.numel()).view(like.shape).to(like.dtype)

    def compare(self, name: str, saved: Weights) -> _Compared:
        """A tensor with what was read back, and with what training began with."""
        expected = self(name).reshape(-1)
        size = expected.numel()
        problem = None
        if not torch.isfinite(expected).all():
            problem = f"{name} is not finite"
        elif not torch.equal(saved(name, 0, size), expected):
            problem = f"{name} is not read back as it was written"
        unchanged = name in self._trained and torch.equal(
            self._weights(name, 0, size).to(expected.dtype), expected
        )
        return _Compared(name, problem, unchanged)


def _files(shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]) -> Iterator[list[str]]:
    """Tensors gathered to files of FILE_BYTES, or of one tensor where that is larger."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * dtypes[name].itemsize
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


def _save_configs(target: Path, base: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """config.json, generation_config.json, and the code of a model that comes with its own."""
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


# --------------------------------------------------------------------------------------------- adapters


def _save_adapter(
    run: RunDir, target: str, config: AdapterConfig, ready: Any, reader: Reader, world: World
) -> list[str]:
    """Writes a peft directory and compares it with the checkpoint; returns what did not change. Rank 0 alone writes.

    `ready` is the peft model, without the base's weights.
    """
    unchanged: list[str] = []

    def write() -> None:
        names = [name for name in reader.shapes if name.startswith(_PREFIX)]
        trained = {name.removeprefix(_PREFIX): reader.whole(name) for name in names}
        begun = {name: parameter for name, parameter in ready.named_parameters() if name in trained}
        unchanged.extend(n for n, p in begun.items() if not p.is_meta and torch.equal(p.float(), trained[n]))
        adapter = Initial.of(ready, trained)
        if config.changes_base:
            adapter = as_plain_lora(adapter, Initial.read(run.initial))
        adapter.config.inference_mode = True  # as peft saves it
        adapter.write(target)
        if problem := _difference(TensorFile(f"{target}/{TENSORS}"), adapter.tensors):
            raise ExportError(problem)

    _main(world, write)
    return list(world.broadcast(unchanged))


def _adapted(run: RunDir, base: PreTrainedModel, config: AdapterConfig, seed: int) -> Any:
    """The peft model as training began with it, without the base's weights."""
    torch.manual_seed(seed)
    begun = Initial.read(run.initial) if initial.is_needed(config) else None
    return initial.adapted(base, config, torch.float32, begun)


def _difference(saved: TensorFile, expected: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the weights in a file: not finite, not as expected, or not all there."""
    if not expected or saved.shapes.keys() != expected.keys():
        return f"not written: {', '.join(sorted(expected.keys() - saved.shapes.keys())[:5]) or 'any weights'}"
    for name, tensor in expected.items():
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
        if saved.shapes[name] != tensor.shape or not torch.equal(saved.read(name), tensor.reshape(-1)):
            return f"{name} is not read back as it was written"
    return None


def describe(final: Final) -> str | None:
    """What people should know of a final model whose tensors did not all change; None if they did."""
    if not final.unchanged:
        return None
    shown = json.dumps(list(final.unchanged[:3]))[1:-1]
    return (
        f"{len(final.unchanged)} of {final.num_trained} trained tensors in final/ equal what training began with "
        f"({shown}{' ...' * (len(final.unchanged) > 3)}): too few steps, too small a learning rate for their number "
        "format, or parts that no token reached"
    )
