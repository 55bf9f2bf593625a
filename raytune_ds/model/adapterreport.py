"""What an adapter trains of a model and what it does not: found by making it, without weights, and counting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.adapterreport import AdapterReport, Group
from raytune_ds.errors import UserError
from raytune_ds.model import adapters
from raytune_ds.model.anatomy import Matrix, anatomy
from raytune_ds.model.lowrank import on_tokens
from raytune_ds.model.targets import choose
from raytune_ds.servable import refusals


def report(model: PreTrainedModel, config: AdapterConfig, made: Any = None) -> AdapterReport:
    """What the config will train of `model`, which is without weights and not to be used afterwards.

    Args:
        model: the base model.
        config: ours.
        made: the peft config to take, where it is not to be made of `config`: that of an adapter that is there.

    Raises:
        UserError: a target matches nothing, or peft refuses the adapter.
    """
    total = sum(p.numel() for p in model.parameters())
    if config.kind == "none":
        return AdapterReport(total, total)
    matrices = anatomy(model)
    reasons = {}
    if made is None:
        chosen = choose(model, config)
        made = adapters.peft_config(model, config, chosen)
        reasons = {matrix.name: why for matrix, why in chosen.left}
    ready = adapters.wrap(model, made, in_memory=False)
    _require_a_plain_head(model)
    layers = {matrix.name: _wrapper(ready, matrix) for matrix in matrices}
    adapted = [matrix for matrix in matrices if layers[matrix.name] is not None]
    whole = tuple(getattr(made, "modules_to_save", None) or ())
    left = [m for m in matrices if layers[m.name] is None and not _is_among(m.owner, whole)]
    bare = [
        m
        for m in adapted
        if hasattr(layer := layers[m.name], "parameter_name") and not on_tokens(layer.get_base_layer())
    ]
    return AdapterReport(
        trainable=sum(p.numel() for p in ready.parameters() if p.requires_grad),
        total=sum(p.numel() for p in ready.parameters()),
        adapted=tuple(_with_adapter(alike, layers) for alike in _grouped(adapted)),
        left_alone=tuple(_left(left, reasons)),
        whole=whole,
        widest_bare=max((matrix.shape.numel() for matrix in bare), default=0),
        unserved=tuple(refusals(made.to_dict())),
    )


def _is_among(owner: str, names: Sequence[str]) -> bool:
    return any(owner == name or owner.endswith(f".{name}") for name in names)


def _require_a_plain_head(model: PreTrainedModel) -> None:
    """Logits are made of the head's own matrix, a part of them at a time.

    Raises:
        UserError: the head has an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "adapter: it adapts the output head, which is trained whole here, or not at all (adapter.modules_to_save)."
        )


def _with_adapter(matrices: Sequence[Matrix], layers: Mapping[str, Any]) -> Group:
    wrappers = [layers[matrix.name] for matrix in matrices]
    ranks = tuple(r for layer in wrappers if isinstance(r := _rank_of(layer), int))
    trained = sum(_num_trained(layer) for layer in wrappers)
    is_bare = hasattr(wrappers[0], "parameter_name")
    return _group(matrices, ranks=ranks, trained=trained, note=_note(matrices[0], is_bare))


def _note(matrix: Matrix, is_bare: bool) -> str:
    if matrix.num_experts > 1:
        return f"{matrix.num_experts} of {matrix.num_experts} experts, as a bare parameter"
    return "as a bare parameter" if is_bare else ""


def _wrapper(ready: nn.Module, matrix: Matrix) -> Any:
    """The peft layer around a matrix, None where there is none; around fused experts one wraps another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = ready.get_submodule(f"base_model.model.{matrix.owner}")
    wanted = matrix.name.rpartition(".")[2]
    while isinstance(layer, BaseTunerLayer):
        if getattr(layer, "parameter_name", wanted) == wanted:
            return layer
        layer = layer.base_layer  # type: ignore[attr-defined]  # all of them have one
    return None


def _rank_of(layer: Any) -> Any:
    rank = getattr(layer, "r", None)
    return rank.get(adapters.NAME) if isinstance(rank, dict) else rank


def _num_trained(layer: nn.Module) -> int:
    """Of the adapter of one layer, without what it is wrapped around."""
    return sum(
        p.numel()
        for name, p in layer.named_parameters()
        if p.requires_grad and not name.startswith("base_layer.")
    )


def _left(left: Sequence[Matrix], reasons: Mapping[str, str]) -> Iterable[Group]:
    by_reason: dict[str, list[Matrix]] = {}
    for matrix in left:
        by_reason.setdefault(reasons.get(matrix.name, "not in that adapter"), []).append(matrix)
    for why, matrices in by_reason.items():
        for alike in _grouped(matrices):
            yield _group(alike, ranks=(), trained=0, note=why)


def _grouped(matrices: Iterable[Matrix]) -> Iterable[list[Matrix]]:
    groups: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.part, matrix.short), []).append(matrix)
    return groups.values()


def _group(matrices: Sequence[Matrix], ranks: tuple[int, ...], trained: int, note: str) -> Group:
    first = matrices[0]
    return Group(
        part=first.part,
        name=first.short,
        count=len(matrices),
        layers=len({matrix.layer for matrix in matrices}),
        shape="x".join(map(str, first.shape)),
        num_parameters=sum(matrix.shape.numel() for matrix in matrices),
        ranks=ranks,
        trained=trained,
        note=note,
    )
