"""An adapter merged into its base model, tensor by tensor, by peft's own code: no process holds the whole model.

A layer that peft has wrapped is given its real base weight when it is asked for, merges it, and lets it go. All of it
is computed in float32 and rounded once, to the precision that the base model's files have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model.load import compute_dtype, hold_in, skeleton
from raytune_ds.model.quantize import dequantised
from raytune_ds.model.weights import Read, Weights, locate, open_weights
from raytune_ds.modelfiles import Compared
from raytune_ds.wrapped import ADAPTER_FILE, Wrapped, load_adapter, plain_name, resize, vocabulary


class Merged:
    """The tensors of a merged model by their names in memory; see `modelfiles.Tensors`.

    Attributes:
        model: the merged model without its weights; its config is the merged model's.
        folder: of the base model.
        shapes: of the tensors, tied ones once.
        merged: names of those that the adapter changes.
        untied: names of those that the base model ties to another tensor, and the adapter makes differ from it.
        kind: peft's name for the type of the adapter.
    """

    def __init__(self, model: ModelConfig, adapter: Path, revision: str | None = None) -> None:
        """Reads headers and the adapter, but no weight of the base model.

        Args:
            model: the base model; where it was quantised in training, the adapter is merged into what it saw then.
            adapter: a peft directory.
            revision: the commit of a base model of the hub.

        Raises:
            UserError: the base model can't be read, or peft can't put this adapter on it or merge it.
        """
        self.model = skeleton(model)
        self.folder = locate(model, revision)
        weights = open_weights(self.folder, self.model)
        self._read, self._stored = _as_trained_on(weights, model), _shapes(self.model)
        self._dtypes = {name: weights.dtype(name) for name in self._stored if name in weights}
        self._source = {name: name for name in self._stored} | _tied(self.model)
        file = load_adapter(adapter / ADAPTER_FILE)
        names = {
            **_shapes(self.model),
            **{name: self._stored[source] for name, source in _tied(self.model).items()},
        }
        self._given = {plain_name(key): tensor for key, tensor in file.items() if plain_name(key) in names}
        rows = vocabulary(self.model, adapter, file)
        resize(self.model, rows)
        self._wrapped = Wrapped(skeleton(model), rows, adapter, self._given)
        self.kind = self._wrapped.kind
        self._written: dict[str, str] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self.untied = self._untie()
        kept = set(_tied(self.model))
        self.shapes = {name: shape for name, shape in _shapes(self.model).items() if name not in kept}
        self.merged = frozenset(name for name in self.shapes if self._is_changed(name))
        self._require_new_rows(rows)

    def dtype(self, name: str) -> torch.dtype:
        """On disk: as in the base model's files."""
        return self._dtypes[self._source[name]]

    @property
    def main_dtype(self) -> torch.dtype:
        """That of most of the weights."""
        sizes: dict[torch.dtype, int] = {}
        for name, shape in self.shapes.items():
            sizes[self.dtype(name)] = sizes.get(self.dtype(name), 0) + shape.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor as it is saved."""
        tensor = self._value(name).to(self.dtype(name)).contiguous()
        self._written[name] = _digest(tensor)
        return tensor

    def compare(self, name: str, saved: Weights) -> Compared:
        """A tensor with what was read back."""
        found = saved(name, 0, self.shapes[name].numel())
        if not torch.isfinite(found).all():
            return Compared(name, f"{name} is not finite in {str(self.dtype(name)).removeprefix('torch.')}")
        same = _digest(found) == self._written[name]
        return Compared(name, None if same else f"{name} is not read back as it was written")

    def _value(self, name: str) -> torch.Tensor:
        """A tensor of the merged model: float32 where it was computed, as it was read where it was not."""
        if name in self._kept:
            return self._kept.pop(name)
        key = self._wrapped.key_of(name)
        if key is None:
            return self._given[name] if name in self._given else self._base(name)
        values = self._wrapped.merge(key, name, self._base_rows)
        value = values.pop(name)
        self._kept = values  # the bias of a layer, which is asked for next
        return value

    def _base(self, name: str) -> torch.Tensor:
        return self._base_rows(name, 0, self._shape(name)[0] if self._shape(name) else 1)

    def _base_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of what the adapter was trained on; rows of a vocabulary that has grown are zeros."""
        if name in self._given:
            return self._given[name][first:last]
        source = self._source[name]
        stored, shape = self._stored[source], self._shape(name)
        if not shape:
            return self._read(source, 0, 1).reshape(())
        row = shape[1:].numel()
        there = self._read(source, first * row, min(last, stored[0]) * row).reshape(-1, *shape[1:])
        missing = (last - first) - len(there)
        return torch.cat([there, there.new_zeros(missing, *shape[1:])]) if missing else there

    def _shape(self, name: str) -> torch.Size:
        return self.model.get_parameter_or_buffer(name).shape

    def _is_changed(self, name: str) -> bool:
        return name in self._given or self._wrapped.key_of(name) is not None

    def _untie(self) -> tuple[str, ...]:
        """Gives tied tensors that the adapter makes differ a place of their own, and returns their names."""
        differ = {}
        for name, source in _tied(self.model).items():
            if self._is_changed(name) or self._is_changed(source):
                values = [self._value(each) for each in (name, source)]
                differ[name] = not torch.equal(*values)
        self._kept = {}
        if not any(differ.values()):
            return ()
        for name in _tied(self.model):  # the config unties all of them or none
            owner, _, own = name.rpartition(".")
            module = self.model.get_submodule(owner)
            setattr(module, own, nn.Parameter(torch.empty_like(getattr(module, own)), requires_grad=False))
        untied = tuple(_tied(self.model))
        self.model.config.tie_word_embeddings = False
        return untied

    def _require_new_rows(self, rows: int | None) -> None:
        """Has the adapter say what each new token is.

        Raises:
            UserError: the vocabulary has grown, and it does not.
        """
        if rows is None:
            return
        for name, old in self._stored.items():
            if name in self.shapes and self.shapes[name] != old:
                new = set(range(old[0], self.shapes[name][0]))
                if name not in self._given and not new <= self._wrapped.trained_rows(name):
                    raise UserError(
                        f"the vocabulary has grown to {rows} tokens, and the adapter does not hold the new rows of "
                        f"{name}: nobody knows what they were. Train it with that module among adapter.modules_to_save."
                    )


def _as_trained_on(weights: Weights, model: ModelConfig) -> Read:
    """The base model's weights as the adapter saw them: it makes up for what quantisation has changed."""
    if model.quantization == "none":
        return weights
    base, device = skeleton(model), device_here()
    hold_in(base, compute_dtype(model.dtype, device))
    return dequantised(weights, base, model.quantization, device)


def device_here() -> torch.device:
    """Where quantised weights are computed with."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Of what a model saves, tied tensors once."""
    saved = model.state_dict().keys()
    return {
        name: tensor.shape
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name in saved
    }


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are another one, and which; none of a model that ties nothing."""
    return dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


def _digest(tensor: torch.Tensor) -> str:
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # a buffer, without a copy
    return xxhash.xxh3_128(content).hexdigest()
