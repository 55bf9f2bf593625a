"""A base model with an adapter around it, of which only the adapter takes memory.

The parameters of the base model are stand-ins: they have a shape, a dtype and a device, as peft wants them, but all
elements of one share a single place in memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.errors import UserError, first_line

ADAPTER_FILE = "adapter_model.safetensors"  # as peft calls it
PART_BYTES = 1 << 28
"""Of the experts of a layer that are merged at once, in float32."""
Rows = Callable[[str, int, int], torch.Tensor]
"""Rows [first, last) of a parameter of the base model, by its name."""
_PEFT = "base_model.model."


class Wrapped:
    """A base model of stand-ins with an adapter around it."""

    def __init__(
        self, base: PreTrainedModel, rows: int | None, adapter: Path, given: Mapping[str, torch.Tensor]
    ) -> None:
        stand_in(base, given)
        resize(base, rows)
        self._originals = dict(base.named_modules(remove_duplicate=False))
        before = {id(p): p.data_ptr() for p in base.parameters()}
        tuner = _on(base, adapter)
        self.kind: str = tuner.peft_config["default"].peft_type.value
        changed = [
            n for n, p in tuner.named_parameters() if id(p) in before and p.data_ptr() != before[id(p)]
        ]
        if changed:
            raise UserError(_relative(adapter))
        self._wrappers = dict(_wrappers(base))
        if not self._wrappers or tuner.peft_config["default"].is_prompt_learning:
            raise UserError(f"{adapter}: {self.kind} has no layers in the model that could be merged.")
        _require_merging(tuner, self._wrappers, self.kind)

    def key_of(self, name: str) -> str | None:
        """Which wrapped module a parameter of the plain model belongs to; None: none, or it is a buffer."""
        parts = name.split(".")
        keys = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        key = next((key for key in keys if key in self._wrappers), None)
        if key is None or name.removeprefix(f"{key}.") not in dict(self._originals[key].named_parameters()):
            return None
        return key

    def trained_rows(self, name: str) -> set[int]:
        """The rows of a vocabulary that an adapter of single tokens holds."""
        adapter = getattr(self._wrappers.get(name.rpartition(".")[0]), "token_adapter", None)
        return set(adapter.token_indices["default"]) if adapter is not None else set()

    def merge(self, key: str, name: str, base_rows: Rows) -> dict[str, torch.Tensor]:
        """The merged tensors of one wrapped module, in float32.

        Args:
            key: of the module.
            name: of a tensor; only it is merged where an adapter is put on parameters one by one.
            base_rows: gives rows of a parameter of the base model.

        Raises:
            UserError: peft refuses.
        """
        original, wrapper = self._originals[key], self._wrappers[key]
        own = name.removeprefix(f"{key}.")
        layers = [layer for layer in _chain(wrapper) if getattr(layer, "parameter_name", own) == own]
        one_by_one = hasattr(wrapper, "parameter_name")
        if one_by_one and len(layers) == 1 and layers[0].num_experts > 1:
            return {name: _merge_experts(layers[0], name, original.get_parameter(own).shape, base_rows)}
        for its_name, parameter in original.named_parameters():
            if not one_by_one or its_name == own:
                size = parameter.shape[0] if parameter.ndim else 1
                parameter.data = base_rows(f"{key}.{its_name}", 0, size).float()
        try:
            if hasattr(wrapper, "unload_and_optionally_merge_module") and not layers:
                result = wrapper.unload_and_optionally_merge_module(
                    merge=True, safe_merge=True, adapter_names=None
                )
            else:
                for layer in reversed(layers):
                    layer.merge(safe_merge=True)
                result = wrapper.get_base_layer()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: peft does not merge it: {first_line(error)}") from error
        found = {f"{key}.{n}": p.data for n, p in result.named_parameters() if not one_by_one or n == own}
        for layer in (module for module in wrapper.modules() if _is_layer(module)):
            layer.merged_adapters = []  # it may be asked for again
        for parameter in original.parameters():
            parameter.data = _nothing(parameter.shape)  # what was merged is given away
        return found


def _merge_experts(layer: Any, name: str, shape: torch.Size, base_rows: Rows) -> torch.Tensor:
    """A parameter of all experts of a layer, some of them at a time: one of DeepSeek-V3 has 7.5 billion elements."""
    with torch.no_grad():
        left, right, scaling = layer.get_delta_factors("default")
        at_once = max(1, PART_BYTES // (4 * shape[1:].numel()))
        merged: torch.Tensor | None = None
        for first in range(0, shape[0], at_once):
            last = min(first + at_once, shape[0])
            base = base_rows(name, first, last)
            part = torch.baddbmm(base.float(), left[first:last], right[first:last], alpha=scaling)
            if merged is None:
                merged = torch.empty(shape, dtype=base.dtype)
            merged[first:last] = part
    assert merged is not None
    return merged


def vocabulary(model: PreTrainedModel, adapter: Path, file: Mapping[str, torch.Tensor]) -> int | None:
    """How many tokens the model has with the adapter; None: as many as without.

    Args:
        model: the plain base model.
        adapter: a peft directory.
        file: its tensors.
    """
    ends = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    old = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index,arg-type]
    sizes = [tensor.shape[0] for key, tensor in file.items() if plain_name(key) in ends]
    indices = config_of(adapter).get("trainable_token_indices") or []
    tokens = [i for listed in (indices.values() if isinstance(indices, dict) else [indices]) for i in listed]
    new: int = max([*sizes, *(token + 1 for token in tokens)], default=old)
    return new if new > old else None


def put_on(base: PreTrainedModel, adapter: Path) -> Any:
    """A loaded base model with an adapter, as plain peft loads it; its vocabulary grows where the adapter's did."""
    from peft import PeftModel

    resize(base, vocabulary(base, adapter, load_adapter(adapter / ADAPTER_FILE)))
    return PeftModel.from_pretrained(base, str(adapter))


def _on(base: PreTrainedModel, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu").requires_grad_(False)
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError, AttributeError) as error:
            if "refers to a single memory location" in str(
                error
            ):  # what torch says of a stand-in that is written to
                raise UserError(_relative(adapter)) from error
            raise UserError(f"{adapter}: peft can't load it: {first_line(error)}") from error
    if missing := [str(w.message) for w in said if "missing adapter keys" in str(w.message)]:
        raise UserError(f"{adapter}: is incomplete: {missing[0][:300]}")
    return model


def _relative(adapter: Path) -> str:
    return (
        f"{adapter}: putting the adapter on changes the base model: it is relative to a base model of its own, as "
        "after init_lora_weights = pissa, olora or loftq. Convert it to plain LoRA first: "
        "https://huggingface.co/docs/peft/developer_guides/lora"
    )


def _require_merging(tuner: Any, wrappers: Mapping[str, Any], kind: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for wrapper in wrappers.values() for layer in _chain(wrapper)]
    if any(type(layer).merge is BaseTunerLayer.merge for layer in layers):
        raise UserError(f"peft has no way to merge {kind} into a model. --to adapter takes it home as it is.")
    try:
        tuner.base_model._check_merge_allowed()
    except (ValueError, NotImplementedError, TypeError) as error:
        raise UserError(f"peft does not merge this adapter: {first_line(error)}") from error


def _wrappers(base: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The modules that peft has wrapped, by their names in the plain model; not those inside one."""
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules(remove_duplicate=False):
        if name.startswith(inside) and inside:
            continue
        if hasattr(module, "unload_and_optionally_merge_module") or _is_layer(module):
            inside = (*inside, f"{name}.")
            yield name, module


def _chain(wrapper: Any) -> list[Any]:
    """The peft layers around one module, from the outside in; none where it is no adapter that is around it."""
    layers = []
    while _is_layer(wrapper):
        layers.append(wrapper)
        wrapper = wrapper.base_layer
    return layers


def _is_layer(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer")


def stand_in(model: PreTrainedModel, given: Mapping[str, torch.Tensor]) -> None:
    """Puts stand-ins in place of all parameters but those of one dimension and those that the adapter brings along."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in list(module.named_parameters(recurse=False)):
            real = parameter.ndim < 2 or f"{path}.{own}" in given
            data = torch.zeros(parameter.shape) if real else _nothing(parameter.shape)
            made.setdefault(id(parameter), nn.Parameter(data, requires_grad=False))
            setattr(module, own, made[id(parameter)])


def _nothing(shape: torch.Size) -> torch.Tensor:
    """Zeros that share one place in memory."""
    return torch.zeros(()).expand(shape)


def resize(model: PreTrainedModel, rows: int | None) -> None:
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)


def plain_name(key: str) -> str:
    """The name in the plain model of a base parameter that peft has saved along."""
    return key.removeprefix(_PEFT).replace(".base_layer.", ".")


def load_adapter(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has several for a damaged file
        raise UserError(f"{path}: can't be read: {first_line(error)}") from error


def config_of(adapter: Path) -> dict[str, Any]:
    values = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return dict(values)
