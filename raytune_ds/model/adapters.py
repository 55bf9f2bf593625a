"""LoRA through peft: which modules get an adapter, and an honest account of which did and which did not."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.config import AdapterConfig
from raytune_ds.console import human_count
from raytune_ds.errors import UserError

WHOLE_MODEL_WORDS = ("auto", "all-linear")


@dataclass(frozen=True)
class Group:
    """Parameters of one kind, over all layers.

    Attributes:
        name: the last part of the module's or parameter's name.
        count: how many of them the model has.
        shape: of one of them, as text.
        num_parameters: of the base model, all of them together.
        note: why there is no adapter; empty where there is one.
    """

    name: str
    count: int
    shape: str
    num_parameters: int
    note: str


@dataclass(frozen=True)
class AdapterReport:
    """What is trained and what is not."""

    trainable: int
    total: int
    adapted: tuple[Group, ...]
    left_alone: tuple[Group, ...]

    def lines(self) -> list[str]:
        """As a person reads it."""
        share = 100 * self.trainable / self.total
        head = f"{human_count(self.trainable)} of {human_count(self.total)} parameters are trained ({share:.2f}%)"
        if not self.adapted:
            return [head]
        adapted = ", ".join(f"{group.name} x{group.count}" for group in self.adapted)
        reasons: dict[str, list[str]] = {}
        for group in self.left_alone:
            reasons.setdefault(group.note, []).append(f"{group.name} x{group.count}")
        alone = [f"  not adapted: {', '.join(names)} ({why})" for why, names in reasons.items()]
        return [head, f"  adapted: {adapted}", *alone]


def resolve_targets(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """The full names of the modules that get an adapter.

    Args:
        model: weights are not needed.
        config: `targets` is auto (every linear layer that peft lets an adapter stay on, see `_moved_by_peft`),
            all-linear (every linear layer but the output head), a list of names or ends of names, or a regular
            expression for the full name. Routers and fused routed experts are no linear layers.

    Raises:
        UserError: a target matches nothing; the message names those that would. Or peft would put it elsewhere.
    """
    candidates = linear_names(model)
    moved = _moved_by_peft(model, {_short(name) for name in candidates})
    matched = _matching(model, config.targets, candidates, moved)
    if refused := sorted({_short(name) for name in matched} & moved):
        raise UserError(
            f"adapter.targets: {', '.join(refused)}: in this {model.config.model_type} model peft puts an adapter of "
            "that name on the fused routed experts instead, and none on the dense and shared experts that it names.\n"
            f"Use adapter.targets=auto ({', '.join(sorted({_short(n) for n in candidates} - moved))})."
        )
    return matched


def _matching(
    model: PreTrainedModel, targets: str | tuple[str, ...], candidates: list[str], moved: set[str]
) -> list[str]:
    if targets == "auto":
        return [name for name in candidates if _short(name) not in moved]
    if targets == "all-linear":
        return candidates
    if isinstance(targets, str):
        matched = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
        if others := [name for name in matched if name not in candidates]:
            raise UserError(
                f"adapter.targets: {targets!r} also matches {', '.join(others[:3])}, which can't take an adapter: "
                "only linear layers other than the output head can."
            )
        if not matched:
            raise UserError(_no_match(model, [targets], candidates, moved))
        return matched
    misses = [t for t in targets if not any(_ends_with(name, t) for name in candidates)]
    if misses:
        raise UserError(_no_match(model, misses, candidates, moved))
    return [name for name in candidates if any(_ends_with(name, target) for target in targets)]


def _moved_by_peft(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Those of `names` that peft rewrites to the fused routed experts.

    peft 0.21 does so for architectures whose experts transformers 5 has fused, also where the name means a dense or a
    shared expert, and again when an adapter is loaded (https://github.com/huggingface/peft/issues/3711). An adapter
    that plain peft loads as it was trained must keep clear of these names.
    """
    if not any(parameter.ndim == 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(config, model, None)
    return names - set(config.target_modules or ())


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def apply(model: PreTrainedModel, config: AdapterConfig, trained_dtype: torch.dtype) -> nn.Module:
    """The model made ready: with an adapter around it, or with all its parameters trainable.

    Args:
        model: without weights; those of the adapter are real afterwards.
        config: what is trained.
        trained_dtype: of what is trained, whatever the base model is in.

    Raises:
        UserError: a target matches nothing.
    """
    ready = model.requires_grad_(True) if config.kind == "none" else _with_adapter(model, config)
    for parameter in ready.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype)
    return ready


def _with_adapter(model: PreTrainedModel, config: AdapterConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    resolved = resolve_targets(model, config)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft computes alpha / r; it need not be whole
        lora_dropout=config.dropout,
        bias=config.bias,
        target_modules=_for_peft(config.targets, resolved),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn again below
        ready = get_peft_model(model, lora)
    for module in ready.modules():
        if isinstance(module, LoraLayer):
            _give_weights(module, ready.active_adapter)
    return ready


def _give_weights(layer: Any, adapter: str) -> None:
    """Initial weights for an adapter that peft, finding a layer without weights, has put on the meta device too.

    Random numbers are drawn as peft draws them for a layer with weights: a seed gives the same adapter either way.
    """
    for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
        part.to_empty(device="cpu").reset_parameters()
    layer.reset_lora_parameters(adapter, init_lora_weights=True)


def report(model: PreTrainedModel, config: AdapterConfig) -> AdapterReport:
    """What the config will train of `model`, whose weights are not needed.

    Raises:
        UserError: a target matches nothing.
    """
    total = sum(p.numel() for p in model.parameters())
    if config.kind == "none":
        return AdapterReport(total, total, (), ())
    chosen = set(resolve_targets(model, config))
    adapted: dict[str, list[nn.Linear]] = {}
    for name, module in model.named_modules():
        if name in chosen and isinstance(module, nn.Linear):
            adapted.setdefault(_short(name), []).append(module)
    groups = [
        Group(
            name,
            len(modules),
            f"{modules[0].in_features}x{modules[0].out_features}",
            sum(m.weight.numel() for m in modules),
            note="",
        )
        for name, modules in adapted.items()
    ]
    linears = (module for modules in adapted.values() for module in modules)
    added = sum(config.r * (m.in_features + m.out_features) for m in linears)
    trainable = added + _num_trained_biases(model, config, chosen)
    return AdapterReport(trainable, total + added, tuple(groups), tuple(_left_alone(model, chosen)))


def _num_trained_biases(model: PreTrainedModel, config: AdapterConfig, chosen: set[str]) -> int:
    biases = [(n, p) for n, p in model.named_parameters() if n.endswith(".bias")]
    if config.bias == "none":
        return 0
    return sum(p.numel() for n, p in biases if config.bias == "all" or n.removesuffix(".bias") in chosen)


def _left_alone(model: PreTrainedModel, chosen: set[str]) -> list[Group]:
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    why_of = {id(head.weight): "output head", id(embeddings.weight): "embedding"}
    linear = {f"{name}.weight" for name in linear_names(model)}
    moved = _moved_by_peft(model, {_short(name) for name in linear_names(model)})
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in chosen or parameter.ndim < 2:
            continue
        if parameter.ndim == 3:
            why = "routed experts, fused into one parameter a layer"
        elif name in linear:
            why = (
                "dense and shared experts: peft would put adapters of these names on the routed experts"
                if _short(name.removesuffix(".weight")) in moved
                else "not among adapter.targets"
            )
        else:
            why = why_of.get(id(parameter), "router")
        short = ".".join(name.removesuffix(".weight").split(".")[-2:])
        groups.setdefault((short, why), []).append(parameter)
    return [
        Group(name, len(ps), "x".join(map(str, ps[0].shape)), sum(p.numel() for p in ps), why)
        for (name, why), ps in groups.items()
    ]


def _for_peft(targets: str | tuple[str, ...], resolved: Sequence[str]) -> str | list[str]:
    """What stands in adapter_config.json: for a whole model the short names, for people and servers to read."""
    if targets in WHOLE_MODEL_WORDS:
        return sorted({_short(name) for name in resolved})
    return targets if isinstance(targets, str) else list(targets)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _ends_with(name: str, target: str) -> bool:
    """Peft's rule for a list of targets."""
    return name == target or name.endswith(f".{target}")


def _no_match(
    model: PreTrainedModel, misses: Sequence[str], candidates: Sequence[str], moved: set[str]
) -> str:
    short = Counter(_short(name) for name in candidates if _short(name) not in moved)
    lines = []
    for miss in misses:
        close = difflib.get_close_matches(miss, short, 4, cutoff=0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        lines.append(
            f"adapter.targets: {miss!r} matches no linear layer of this {model.config.model_type} model{hint}"
        )
    listed = ", ".join(f"{name} (x{count})" for name, count in sorted(short.items()))
    lines.append(f"Those that would match: {listed}. Or leave adapter.targets at auto.")
    return "\n".join(lines)
