"""Adapters of any kind through peft: its config from ours, and a model wrapped in one.

Peft makes each kind's weights in its own way, on the device of the layer that it wraps. A model without weights has
none; so while peft is at work, every base weight is a single number that is read as a whole matrix, which takes no
memory. What a kind takes from the real weights (`needs_base_weights`) is computed layer by layer in `model/initial`.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.adapterconfig import PLANNING, TOTAL_STEPS, AdapterConfig
from raytune_ds.errors import UserError, first_line
from raytune_ds.model.load import standing_in
from raytune_ds.model.targets import NOT_IN_LAYERS, Chosen, choose, shortest_names
from raytune_ds.section import as_mapping

NAME = "default"
"""Of the adapter within a peft model, as peft calls it where one gives none."""

# Keys of ours that peft has other names for; some of its methods call a thing as lora does, some plainly.
_SPELLED: dict[str, tuple[str, ...]] = {
    "r": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "module_dropout", "vera_dropout", "dropout"),
    "bias": ("bias",),
}

# Of a run whose length is not known, when only the adapter's size is asked for.
_SOME_LENGTH = 1 << 30
_FROM_WEIGHTS = "begins with something made of the base weights, which this trainer does for lora alone"
_OTHERWISE = "does not wrap layers in place"
REFUSED = {
    **dict.fromkeys(
        ("adamss", "deft", "delora", "frod", "ln_tuning", "osf", "psoft", "supertuning", "tinylora"),
        _FROM_WEIGHTS,
    ),
    **dict.fromkeys(("adaption_prompt", "xlora"), _OTHERWISE),
    "shadow": "computes beside the model, not in its layers",
    "lily": "saved by peft 0.21, it computes otherwise when it is loaded",
    "poly": "wants to be told a task with each row",
    "trainable_tokens": "trains tokens and no layers; see adapter.modules_to_save",
}
"""Methods of peft that are not trained here, and why. Those that take prompt tokens are refused by their class."""


def kinds() -> list[str]:
    """The methods of peft that wrap layers in place, by the names that `adapter.kind` takes."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(
        str(kind.value).lower()
        for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not issubclass(made, PromptLearningConfig) and str(kind.value).lower() not in REFUSED
    )


def peft_config(model: PreTrainedModel, config: AdapterConfig, chosen: Chosen) -> Any:
    """What peft makes the adapter from.

    Args:
        model: weights are not needed.
        config: ours.
        chosen: what gets an adapter.

    Raises:
        UserError: peft knows no such method, or refuses an option.
    """
    made = _config_class(config.kind)
    known = {field.name for field in fields(made)}
    values: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    values |= _spelled(config, known)
    values |= _targets(model, config, chosen, known)
    if config.kind == "lora":
        _require_patterns_mean_something(config, chosen)
        values |= {
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            # Peft's own LoftQ runs on GPUs only, and forgets that the adapter is scaled; see model/initial.
            "init_lora_weights": True
            if config.init_lora_weights in ("default", "loftq")
            else config.init_lora_weights,
            "rank_pattern": as_mapping(config.rank_pattern),
            "alpha_pattern": as_mapping(config.alpha_pattern),
        }
    if config.modules_to_save:
        values["modules_to_save"] = _existing(model, config.modules_to_save)
    if config.kind in PLANNING:
        values[TOTAL_STEPS] = _SOME_LENGTH
    values |= _options(config, known)
    try:
        return made(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"adapter: peft refuses it: {first_line(error)}") from error


def require_known(kind: str, place: str = "") -> None:
    """Refuses methods that are not trained here.

    Raises:
        UserError: with the reason; `place` stands before it.
    """
    from peft import PeftType

    if kind in (known := kinds()):
        return
    close = difflib.get_close_matches(kind, known, 3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    there = kind.upper() in PeftType.__members__
    reason = REFUSED.get(kind, _OTHERWISE if there else "peft has no such method")
    raise UserError(f"{place}adapter.kind = {kind}: {reason}. {hint}There are {', '.join(known)}, and none.")


def _config_class(kind: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    require_known(kind)
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]


def _spelled(config: AdapterConfig, known: set[str]) -> dict[str, Any]:
    values = {}
    for key, spellings in _SPELLED.items():
        value = getattr(config, key)
        spelling = next((name for name in spellings if name in known), None)
        if spelling is not None and value is not None:
            values[spelling] = value
        elif spelling is None and value not in (None, type(config).model_fields[key].default):
            raise UserError(
                f"adapter.{key} = {value}: has no meaning with adapter.kind={config.kind}; leave it out."
            )
    return values


def _targets(
    model: PreTrainedModel, config: AdapterConfig, chosen: Chosen, known: set[str]
) -> dict[str, Any]:
    owners = {matrix.owner for matrix in chosen.modules}
    names = {matrix.name for matrix in chosen.parameters}
    others = {name for name, _ in model.named_modules()} - owners
    values: dict[str, Any] = {}
    if config.layers is not None and "layers_to_transform" in known:
        values["layers_to_transform"] = (
            sorted({m.layer for m in chosen.modules if m.layer is not None}) or None
        )
        others -= {m.owner for m, why in chosen.left if why == NOT_IN_LAYERS}
    values["target_modules"] = shortest_names(owners, others)
    if names:
        others = {name for name, _ in model.named_parameters()} - names
        values["target_parameters"] = shortest_names(names, others, words=2)
    if "feedforward_modules" in known:  # IA3 scales what goes into these, and what comes out of the others
        feedforward = {matrix.owner for matrix in chosen.modules if matrix.part != "attention"}
        values["feedforward_modules"] = shortest_names(feedforward, owners - feedforward)
    return values


def _require_patterns_mean_something(config: AdapterConfig, chosen: Chosen) -> None:
    """Peft passes over a key that matches nothing."""
    names = [matrix.owner if matrix in chosen.modules else matrix.name for matrix in chosen.all]
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in as_mapping(patterns):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                near = difflib.get_close_matches(
                    pattern, {matrix.short for matrix in chosen.all}, 3, cutoff=0.5
                )
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                raise UserError(f"adapter.{key}: {pattern!r} matches nothing that gets an adapter{hint}")


def _existing(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Modules to save whole.

    Raises:
        UserError: there is none of a name.
    """
    there = [name for name, _ in model.named_modules()]
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in there):
            near = difflib.get_close_matches(name, {full.rpartition(".")[2] for full in there}, 3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise UserError(f"adapter.modules_to_save: {name!r} is no module of this model{hint}")
    return list(names)


def _options(config: AdapterConfig, known: set[str]) -> dict[str, Any]:
    """Nested again: `eva_config.rho` is one of several options of `eva_config`."""
    values: dict[str, Any] = {}
    for key, value in as_mapping(config.options).items():
        *above, last = key.split(".")
        if (first := (*above, last)[0]) not in known:
            near = difflib.get_close_matches(first, known, 3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"It has {', '.join(sorted(known))}."
            raise UserError(f"adapter.options.{first}: {config.kind} has no such option; {hint}")
        inner = values
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = list(value) if isinstance(value, tuple) else value
    return values


def apply(
    model: PreTrainedModel, config: AdapterConfig, trained_dtype: torch.dtype, made: Any = None
) -> nn.Module:
    """The model made ready: with an adapter around it, or with all its parameters trainable.

    Args:
        model: without weights; those of the adapter are real afterwards.
        config: what is trained.
        trained_dtype: of what is trained, whatever the base model is in.
        made: the peft config to take, where it is not to be made of `config`: that of an adapter that is there.

    Raises:
        UserError: a target matches nothing, or peft refuses the adapter.
    """
    if config.kind == "none":
        ready: nn.Module = model.requires_grad_(True)
    else:
        ready = wrap(model, made or peft_config(model, config, choose(model, config)))
    for parameter in ready.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype)
    return ready


def wrap(model: PreTrainedModel, made: Any, in_memory: bool = True) -> nn.Module:
    """A peft model around one without weights; its adapter begins as peft draws it.

    Args:
        model: parameters may be on the meta device, and are the same objects afterwards.
        made: a peft config; of how a LoRA adapter begins only what is drawn is heeded.
        in_memory: False: the adapter's weights have shapes only.

    Raises:
        UserError: peft refuses it.
    """
    from peft import get_peft_model

    begins = getattr(made, "init_lora_weights", None)
    if begins not in (None, "gaussian", "orthogonal"):
        made.init_lora_weights = True
    try:
        with standing_in(model) if in_memory else contextlib.nullcontext():
            return get_peft_model(model, made, low_cpu_mem_usage=not in_memory)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"adapter: peft refuses it: {first_line(error)}") from error
    finally:
        if begins is not None:
            made.init_lora_weights = begins


def trained_part(module: Any) -> nn.Module:
    """A module, or the copy of it that is trained where peft keeps one (`modules_to_save`)."""
    from peft.utils.other import ModulesToSaveWrapper

    part: nn.Module = module.modules_to_save[NAME] if isinstance(module, ModulesToSaveWrapper) else module
    return part


def trained_whole(ready: nn.Module) -> dict[str, nn.Parameter]:
    """Name of each parameter of such a copy -> the parameter that it is a copy of."""
    from peft.utils.other import ModulesToSaveWrapper

    return {
        f"{name}.modules_to_save.{NAME}.{inner}": original
        for name, module in ready.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for inner, original in module.original_module.named_parameters()
    }


def deltas(ready: nn.Module) -> dict[str, Delta]:
    """Name of each weight with a LoRA adapter -> what the adapter adds to it."""
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [(n, m) for n, m in ready.named_modules() if isinstance(m, LoraLayer)]
    return {
        f"{name}.base_layer.weight": Delta(
            layer.lora_A[NAME].weight.detach().clone(),
            layer.lora_B[NAME].weight.detach().clone(),
            layer.scaling[NAME],
        )
        for name, layer in layers
    }


@dataclass(frozen=True)
class Delta:
    """`scale` times B times A, any range of it. Axes: R = rank, I = inputs, O = outputs."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) in row-major order, float32."""
        width = self.a_RI.shape[1]
        first, last = start // width, -(-stop // width)
        rows = self.scale * (self.b_OR[first:last].float() @ self.a_RI.float())
        return rows.reshape(-1)[start - first * width : stop - first * width]
