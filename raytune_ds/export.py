"""What the user takes home: an adapter that peft loads, or a model that transformers loads.

It is made from a checkpoint, file by file, and not from the running model: any checkpoint can be exported, whichever
engine wrote it. What was written is read back before it is called saved.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raytune_ds import storage
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.checkpoint import Reader
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import initial
from raytune_ds.model.initial import TENSORS, Initial, as_plain_lora
from raytune_ds.model.load import hold_in, skeleton
from raytune_ds.model.weights import Weights, locate, open_weights
from raytune_ds.modelfiles import Compared, ExportError, save_configs, write_weights
from raytune_ds.modelfiles import on_main as _main
from raytune_ds.rundir import RunDir
from raytune_ds.tensorfile import TensorFile
from raytune_ds.world import World

# Names in a checkpoint are those of the trained module, whose Hugging Face or peft model is its `model`.
_PREFIX = "model/model."


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
                save_configs(local, base, folder, dtype)
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
    found = write_weights(target, base, _Tensors(base, weights, reader), world)
    return sorted(result.name for result in found if result.unchanged)


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

    def compare(self, name: str, saved: Weights) -> Compared:
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
        return Compared(name, problem, unchanged)


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
