"""`adapter.targets`: which matrices of a model get an adapter, and how peft reaches each of them.

Most are linear layers, which peft wraps (`target_modules`). Three kinds it only reaches as bare parameters
(`target_parameters`): fused routed experts; linear layers that compute in a way of their own; and those whose names
peft moves. peft 0.21 rewrites gate_proj, up_proj and down_proj of architectures whose experts transformers 5 has fused
to the routed experts, also where the name means a dense layer or a shared expert, and does so again when an adapter is
loaded (https://github.com/huggingface/peft/issues/3711). LoRA of bare parameters is computed on the tokens here
(model/lowrank); the other ways of peft make the gradient of the whole parameter.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.errors import UserError
from raytune_ds.model.anatomy import Matrix, Part, anatomy

LINEAR: tuple[Part, ...] = ("attention", "mlp", "shared-experts")
GROUPS: dict[str, tuple[Part, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "shared-experts": ("shared-experts",),
    "experts": ("experts",),
    "router": ("router",),
    "all-linear": LINEAR,
    "all": (*LINEAR, "experts"),
}
"""What each word of `adapter.targets` stands for; `auto` is all-linear without what peft reaches as a parameter."""

NOT_IN_LAYERS = "not among adapter.layers"
_NEVER = {
    "indexer": "chooses what is attended to; no gradient comes through it",
    "embedding": "adapter.modules_to_save trains such modules whole",
    "head": "adapter.modules_to_save trains such modules whole",
    "other": "no linear layer",
}


@dataclass(frozen=True)
class Chosen:
    """What gets an adapter.

    Attributes:
        modules: linear layers that peft wraps.
        parameters: what it reaches as bare parameters.
        left: everything else, with the reason.
    """

    modules: tuple[Matrix, ...]
    parameters: tuple[Matrix, ...]
    left: tuple[tuple[Matrix, str], ...]

    @property
    def all(self) -> tuple[Matrix, ...]:
        """All that get one."""
        return (*self.modules, *self.parameters)


def choose(model: PreTrainedModel, config: AdapterConfig) -> Chosen:
    """What `adapter.targets` and `adapter.layers` choose of a model, whose weights are not needed.

    Raises:
        UserError: a target matches nothing, and the message names those that would; or this kind of adapter can't
            reach it.
    """
    matrices = anatomy(model)
    moved = moved_by_peft(model, config.kind, {m.short for m in matrices if m.part in LINEAR})
    wrappable = {m.name for m in matrices if m.is_linear and m.short not in moved}
    by_target = _named(model, config.targets, matrices, wrappable)
    in_layers = {m.name for m in matrices if config.layers is None or m.layer in layer_numbers(config.layers)}
    chosen = [m for m in matrices if m.name in by_target and m.name in in_layers]
    if not chosen:
        raise UserError(
            f"adapter.layers: {config.layers}: adapter.targets has nothing in them; this model has layers 0 to "
            f"{max(m.layer or 0 for m in matrices)}."
        )
    parameters = tuple(m for m in chosen if m.name not in wrappable)
    if parameters:
        _require_parameters_reachable(config, parameters, moved)
    left = ((m, _why_not(m, by_target, wrappable, config)) for m in matrices if m not in chosen)
    return Chosen(tuple(m for m in chosen if m.name in wrappable), parameters, tuple(left))


def _named(
    model: PreTrainedModel,
    targets: str | tuple[str, ...],
    matrices: Sequence[Matrix],
    wrappable: Collection[str],
) -> set[str]:
    """Names of the matrices that the targets mean, in any layer."""
    if targets == "auto":
        return {m.name for m in matrices if m.part in LINEAR and m.name in wrappable}
    if isinstance(targets, str) and targets not in GROUPS:
        return _matched(model, targets, matrices)
    found: set[str] = set()
    misses = []
    for target in (targets,) if isinstance(targets, str) else targets:
        meant = {m.name for m in matrices if _means(target, m)}
        found |= meant
        if not meant:
            misses.append(target)
    if misses:
        raise UserError(_no_match(model, misses, matrices))
    return found


def _means(target: str, matrix: Matrix) -> bool:
    """Whether a word or a name, or the end of a name, means it; peft's rule for names."""
    if target in GROUPS:
        return matrix.part in GROUPS[target]
    return matrix.part not in _NEVER and any(
        name == target or name.endswith(f".{target}") for name in _names(matrix)
    )


def _names(matrix: Matrix) -> tuple[str, ...]:
    return (matrix.owner, matrix.name) if matrix.is_weight else (matrix.name,)


def _matched(model: PreTrainedModel, pattern: str, matrices: Sequence[Matrix]) -> set[str]:
    """What a regular expression for the whole name matches."""
    matched = [m for m in matrices if any(re.fullmatch(pattern, name) for name in _names(m))]
    if others := [m for m in matched if m.part in _NEVER]:
        raise UserError(
            f"adapter.targets: {pattern!r} also matches {', '.join(m.owner for m in others[:3])}, which can't take "
            f"an adapter: {_NEVER[others[0].part]}."
        )
    if not matched:
        raise UserError(_no_match(model, [pattern], matrices))
    return {m.name for m in matched}


def layer_numbers(layers: Iterable[int | tuple[int, int]]) -> set[int]:
    """Layer numbers from numbers and (first, last) ranges."""
    spans = ((entry, entry) if isinstance(entry, int) else entry for entry in layers)
    return {number for first, last in spans for number in range(first, last + 1)}


def moved_by_peft(model: PreTrainedModel, kind: str, names: set[str]) -> set[str]:
    """Those of `names` that peft rewrites to the fused routed experts; see the module."""
    if kind != "lora" or not any(parameter.ndim == 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted(names))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except (
        ValueError
    ):  # some of the names that are fused into one are not here: none can be told apart from them
        return names
    return names - set(config.target_modules or ())


def _require_parameters_reachable(
    config: AdapterConfig, parameters: Sequence[Matrix], moved: set[str]
) -> None:
    """Refuses what peft can't do with bare parameters.

    Raises:
        UserError: naming all that stand in the way.
    """
    reasons = []
    if config.kind != "lora":
        reasons.append(f"adapter.kind={config.kind} (only lora reaches them)")
    if config.dropout:
        reasons.append(f"adapter.dropout={config.dropout:g} (set it to 0)")
    if config.use_dora:
        reasons.append("adapter.use_dora=true (set it to false)")
    if config.init_lora_weights not in ("default", "gaussian"):
        reasons.append(f"adapter.init_lora_weights={config.init_lora_weights} (take default or gaussian)")
    if reasons:
        named = ", ".join(sorted({m.short for m in parameters}))
        raise UserError(
            f"adapter.targets: {named}: peft reaches these as bare parameters only, which does not go with "
            f"{' and '.join(reasons)}. Or leave adapter.targets at auto."
        )


def _why_not(matrix: Matrix, by_target: set[str], wrappable: Collection[str], config: AdapterConfig) -> str:
    if matrix.name in by_target:
        return NOT_IN_LAYERS
    if matrix.part in _NEVER:
        return _NEVER[matrix.part]
    if matrix.part == "router":
        return "adapter.targets=[router] would"
    if config.targets == "auto" and matrix.name not in wrappable:
        return "peft reaches them as bare parameters only, which auto leaves out; adapter.targets=all, or some of them"
    return "not among adapter.targets"


def shortest_names(chosen: Iterable[str], others: Iterable[str], words: int = 1) -> list[str]:
    """The shortest ends of the chosen names that are no end of another name: as people and servers read them.

    Args:
        chosen: dotted names.
        others: those that must not be meant.
        words: the least number of words of an end.
    """
    taken = {end for other in others for end in _ends(other)}
    return sorted(
        {next((e for e in list(_ends(name))[words - 1 :] if e not in taken), name) for name in chosen}
    )


def _ends(name: str) -> Iterator[str]:
    """Ends of a dotted name, the shortest first; none begins with the number of a layer."""
    words = name.split(".")
    for start in range(len(words) - 1, -1, -1):
        if not words[start].isdigit():
            yield ".".join(words[start:])


def _no_match(model: PreTrainedModel, misses: Sequence[str], matrices: Sequence[Matrix]) -> str:
    kind = model.config.model_type
    able = [m for m in matrices if m.part not in _NEVER and m.part != "router"]
    short = Counter(m.short for m in able)
    lines = []
    for miss in misses:
        if miss in GROUPS:
            lines.append(f"adapter.targets: this {kind} model has no {miss}")
            continue
        close = difflib.get_close_matches(miss, short, 4, cutoff=0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        lines.append(f"adapter.targets: {miss!r} matches no linear layer of this {kind} model{hint}")
    by_part: dict[str, list[str]] = {}
    for matrix in able:
        names = by_part.setdefault(matrix.part, [])
        if matrix.short not in names:
            names.append(matrix.short)
    lines.append("Those that would match:")
    lines += [f"  {part}: {', '.join(sorted(names))}" for part, names in by_part.items()]
    lines.append(f"Write some of these names, or some of the words {', '.join(GROUPS)}, or leave it at auto.")
    return "\n".join(lines)
