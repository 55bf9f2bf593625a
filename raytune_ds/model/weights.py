"""The weights of a base model, read from its files by the names they have in memory, a range at a time.

No process ever holds the whole model for it: each asks for the part it keeps. What transformers converts when it loads
(one file entry an expert to one fused parameter a layer) is converted here by the same rules, and DeepSeek's published
FP8 weights are scaled back as they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model.folder import PATTERNS, damaged, files
from raytune_ds.tensorfile import TensorFile

Read = Callable[[str, int, int], torch.Tensor]
"""Elements [start, stop) of the parameter or buffer of that name in row-major order, one-dimensional, on the CPU."""

_SCALE = "_scale_inv"
_MEAN_ELEMENTS = 1 << 26  # read at a time to take a mean


@dataclass
class _Source:
    """What one parameter is made of: file entries by source pattern, and transformers' rule to make it of them."""

    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)


class Weights:
    """The weights below a model directory."""

    def __init__(
        self,
        opened: Sequence[File],
        place: str,
        model: PreTrainedModel,
        grown: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Reads the files' headers.

        Args:
            opened: the model's files.
            place: where they lie, for messages.
            model: gives names, shapes and conversions; its own weights are not looked at.
            grown: parameters with a row for each token, where tokens were added -> the number of tokens before. Later
                rows, whether the files have some or not, are read as the mean of those.

        Raises:
            UserError: there are no weights, or they are not this model's.
        """
        self._place, self._model = place, model
        self._files = {name: file for file in opened for name in _names(file)}
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._grown = grown
        self._sources = self._match()
        self._require_all()
        self._last: tuple[str, torch.Tensor] | None = None
        self._means: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Read; in the dtype of the file."""
        if name in self._grown and stop > (held := self._grown[name] * self._shapes[name][1]):
            there = [self(name, start, held)] if start < held else []
            return torch.cat([*there, self._added(name, max(start, held), stop)])
        source = self._sources[name]
        row = math.prod(self._shapes[name][1:])
        first, last = start // row, -(-stop // row)
        if source.converter is None:
            ((key,),) = source.keys.values()
            part = self._rows(key, first, last)
        elif _keeps_rows(source.converter):
            part = self._converted(name, source, slice(first, last))
        else:
            if self._last is None or self._last[0] != name:
                self._last = None  # before the next one is made
                self._last = (name, self._converted(name, source, slice(None)))
            part = self._last[1][first:last]
        return part.reshape(-1)[start - first * row : stop - first * row]

    def _added(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of rows of added tokens: each is the mean of the others, as transformers begins."""
        rows, width = self._grown[name], self._shapes[name][1]
        if name not in self._means:
            step = max(1, _MEAN_ELEMENTS // width)
            parts = (self(name, i * width, min(rows, i + step) * width) for i in range(0, rows, step))
            self._means[name] = (
                sum((p.view(-1, width).double().sum(0) for p in parts), torch.zeros(())) / rows
            )
        first, last = start // width, -(-stop // width)
        added = self._means[name].to(self(name, 0, 1).dtype).repeat(last - first)
        return added[start - first * width : stop - first * width]

    def dtype(self, name: str) -> torch.dtype:
        """In which `__call__` gives a parameter or buffer: that of its file, or bfloat16 for block-wise FP8."""
        key = next(iter(self._sources[name].keys.values()))[0]
        return torch.bfloat16 if key + _SCALE in self._files else self._files[key].dtype(key)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold that parameter or buffer."""
        return name in self._sources

    def _match(self) -> dict[str, _Source]:
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, known = self._model.base_model_prefix, dict.fromkeys(self._shapes, True)
        sources: dict[str, _Source] = {}
        for key in sorted(self._files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            rule = by_pattern[pattern] if pattern else None
            for target in _targets(name, rule):
                if target in known:
                    source = sources.setdefault(target, _Source(rule))
                    source.keys.setdefault(pattern or key, []).append(key)
        return sources

    def _require_all(self) -> None:
        tied = self._model.all_tied_weights_keys if self._model.config.tie_word_embeddings else {}
        missing = [name for name in self._shapes if name not in self._sources and name not in tied]
        if missing:
            raise UserError(
                f"model.name: {self._place}: its files hold no weights for {', '.join(missing[:3])}"
                + f" and {len(missing) - 3} more" * (len(missing) > 3)
                + "; they are of another model than its config.json, or incomplete."
            )
        for name, source in self._sources.items():
            found = self._shape_in_files(name, source)
            expected = list(self._shapes[name])
            if (
                name in self._grown
                and isinstance(found, list)
                and self._grown[name] <= found[0] <= expected[0]
            ):
                expected[0] = found[0]
            if found != expected:
                raise UserError(
                    f"model.name: {self._place}: {name} has shape {found} in the files, and {expected} by its "
                    "config.json."
                )

    def _shape_in_files(self, name: str, source: _Source) -> list[int] | str:
        """The shape that a parameter will have, found without reading it."""
        if source.converter is None:
            ((key,),) = source.keys.values()
            return list(self._files[key].shapes[key])
        try:
            made = self._converted(
                name,
                source,
                slice(None),
                lambda key: torch.empty(self._files[key].shapes[key], device="meta"),
            )
        except (RuntimeError, ValueError, IndexError) as error:  # entries that do not fit together
            return f"none ({str(error).strip().splitlines()[0]})"
        return list(made.shape)

    def _converted(
        self, name: str, source: _Source, rows: slice, entry: Callable[[str], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """A parameter made of file entries, or of some of them; `entry` gives an entry's tensor."""
        assert source.converter is not None
        converter = deepcopy(source.converter)
        for pattern, keys in source.keys.items():
            for key in keys[rows]:
                converter.add_tensor(name, key, pattern, (entry or self._whole)(key))  # type: ignore[arg-type]
        tensor = converter.convert(name, model=self._model, config=self._model.config)[name]
        return tensor[0] if isinstance(tensor, list) else tensor

    def _whole(self, key: str) -> torch.Tensor:
        shape = self._files[key].shapes[key]
        return self._rows(key, 0, shape[0] if shape else 1).reshape(shape)

    def _rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a file entry."""
        file, shape = self._files[key], self._files[key].shapes[key]
        if key + _SCALE in self._files:
            return self._scaled_back(key)[first:last]
        row = math.prod(shape[1:])
        return file.read(key, first * row, last * row).reshape(last - first, *shape[1:])

    def _scaled_back(self, key: str) -> torch.Tensor:
        """An FP8 matrix in bfloat16: every block of it times its own scale."""
        file, scales = self._files[key], self._files[key + _SCALE]
        (rows, columns), (blocks, blocks_across) = file.shapes[key], scales.shapes[key + _SCALE]
        scale = scales.read(key + _SCALE, 0, blocks * blocks_across).reshape(blocks, blocks_across).float()
        # Blocks are square; the last ones may be cut off, so their size is in the config rather than in the shapes.
        height, width = self._model.config.fp8_block_size
        scale = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        return (file.read(key, 0, rows * columns).reshape(rows, columns).float() * scale).bfloat16()


def _grown(model: PreTrainedModel) -> dict[str, int]:
    """Parameters with a row for each token -> tokens of the files, where some were added."""
    if (rows := getattr(model.config, "grown_from", None)) is None:
        return {}
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    held = {id(p) for module in modules for p in module.parameters()}
    return {name: rows for name, p in model.named_parameters() if id(p) in held and p.ndim == 2}


def _targets(name: str, rule: WeightConverter | None) -> Iterator[str]:
    """All parameters that one file entry goes to; `name` is the first."""
    yield name
    if rule is not None:
        first, *others = rule.target_patterns
        yield from (name.replace(first, other) for other in others)


def _keeps_rows(rule: WeightConverter) -> bool:
    """Whether rows of what the rule makes (experts) are made of as many file entries each, so that some can be read."""
    first, *rest = rule.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(operation, Concatenate) and operation.dim != 0 for operation in rest)


# ------------------------------------------------------------------------------------------------- files


class _PickledFile:
    """A torch.save file, as older models have; mapped into memory, tensors only."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._tensors: Mapping[str, torch.Tensor] = torch.load(
            path, map_location="cpu", mmap=True, weights_only=True
        )
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order."""
        return self._tensors[name].reshape(-1)[start:stop].clone()


File = TensorFile | _PickledFile


def open_weights(folder: Path, model: PreTrainedModel) -> Weights:
    """The weights of a Hugging Face model directory.

    Raises:
        UserError: there are none, or they are not this model's.
    """
    return Weights([_open(path) for path in files(folder)], str(folder), model, _grown(model))


def fill_buffers(model: PreTrainedModel, weights: Weights) -> None:
    """Gives a skeleton those buffers that the files hold, such as a router's biases."""
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights(name, 0, buffer.numel()).view_as(buffer))


def _open(path: Path) -> File:
    try:
        return TensorFile(str(path)) if path.suffix == ".safetensors" else _PickledFile(path)
    except Exception as error:  # torch.load has many for a damaged file
        raise UserError(damaged(path, error)) from error


def _names(file: File) -> Iterable[str]:
    try:
        return file.shapes
    except (OSError, ValueError, TypeError, KeyError, LookupError) as error:
        raise UserError(damaged(file.path, error)) from error


def locate(config: ModelConfig, revision: str | None) -> Path:
    """The directory of a model; one of the hub is downloaded, once a node.

    Args:
        config: names it.
        revision: the commit of a model of the hub.

    Raises:
        UserError: it can't be downloaded.
    """
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        return folder
    for local_only in (True, False):
        for pattern in PATTERNS:
            try:
                place = Path(
                    snapshot_download(
                        config.name,
                        revision=revision,
                        allow_patterns=[pattern, "*.json", *(["*.py"] if config.trust_remote_code else [])],
                        local_files_only=local_only,
                    )
                )
                files(place)
                return place
            except (OSError, UserError, ValueError) as error:
                reason = error
    raise UserError(f"model.name = {config.name}: can't be downloaded: {reason}") from reason


def is_block_fp8(quantization: Mapping[str, Any]) -> bool:
    """Whether a model's own quantization is the one that is undone here, that of DeepSeek's published models."""
    return quantization.get("quant_method") == "fp8" and quantization.get("weight_block_size") is not None
