"""The searched keys of a sweep: held against the config they are keys of, and how values become a trial's config."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from raytune_ds.aliases import suggestions
from raytune_ds.compose import overridden
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.keys import KEYS
from raytune_ds.sweepconfig import POPULATION, Dimension

Values = dict[str, Any]
"""Dotted key to value."""

WHERE = "sweep.space"
TRIALS = 16
# A trial's place in the sweep, and what no trial looks at.
_NOT_SEARCHED = ("run.name", "run.storage", "run.resume", "cluster.", "sweep.", "tracking.")
# Combinations that are tried before anything starts: enough to meet two keys that can't go together.
_TRIED = 200
_TOLD = 5

_LORA: Mapping[str, Any] = {
    # Twice the rank keeps the adapter's scale the same, so that the rank is compared and not the step size.
    "adapter.alpha": {"expr": "2 * adapter.r"},
    "adapter.dropout": {"choice": [0.0, 0.05, 0.1]},
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lora": {
        "adapter.r": {"choice": [4, 8, 16, 32, 64]},
        "train.learning_rate": {"loguniform": [2e-5, 2e-3]},
        **_LORA,
    },
    # Quantized weights take a larger rank to make good what they lost, and a rate of the lower half.
    "qlora": {
        "adapter.r": {"choice": [16, 32, 64]},
        "train.learning_rate": {"loguniform": [2e-5, 5e-4]},
        **_LORA,
    },
    # Of other methods only their own options say how large they are.
    "other": {"train.learning_rate": {"loguniform": [2e-5, 5e-3]}},
    "full": {
        "train.learning_rate": {"loguniform": [1e-6, 1e-4]},
        "train.weight_decay": {"choice": [0.0, 0.01, 0.1]},
        "train.warmup_ratio": {"choice": [0.03, 0.1]},
    },
}
"""The spaces of a config that names none."""


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        searched: keys that a searcher draws.
        formulas: keys that follow from those.
    """

    searched: tuple[Dimension, ...]
    formulas: tuple[Dimension, ...]

    @staticmethod
    def of(config: Config) -> Space:
        """The config's own, or the default one for what it trains."""
        dimensions = config.sweep.space
        if dimensions is None:
            default = overridden(config, {"sweep": {"space": DEFAULTS[_default_name(config)]}}, WHERE)
            dimensions = default.sweep.space
        assert dimensions is not None
        return Space(
            tuple(d for d in dimensions if d.verb != "expr"), tuple(d for d in dimensions if d.verb == "expr")
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(d.key for d in (*self.searched, *self.formulas))

    def complete(self, base: Config, drawn: Values) -> Values:
        """The drawn values, and those that follow from them and from the other keys of the config.

        Raises:
            UserError: a formula has no value.
        """
        values = dict(drawn)
        tree = base.model_dump(mode="json")
        for key, value in drawn.items():
            _put(tree, key, value)
        for dimension in self.formulas:
            values[dimension.key] = _computed(dimension, tree)
            _put(tree, dimension.key, values[dimension.key])
        return values

    def applied(self, base: Config, drawn: Values) -> Config:
        """The config that drawn values make of one.

        Raises:
            UserError: they don't go together.
        """
        return overridden(base, self.complete(base, drawn), WHERE)

    @property
    def grid_size(self) -> int:
        """How many combinations of choices there are."""
        return math.prod(len(d.values) for d in self.searched)

    def grid_point(self, index: int) -> Values:
        """One of the combinations of choices, the last key changing fastest."""
        point: Values = {}
        for dimension in reversed(self.searched):
            index, which = divmod(index, len(dimension.values))
            point[dimension.key] = dimension.values[which]
        return {d.key: point[d.key] for d in self.searched}

    def corners(self) -> Iterator[tuple[str, Values]]:
        """Each choice of each key, or its bounds and a value between; with it the other keys at their first."""
        first = {d.key: _samples(d)[0] for d in self.searched}
        for dimension in self.searched:
            for value in _samples(dimension):
                yield dimension.key, first | {dimension.key: value}


def trial_base(base: Config) -> Config:
    """What all trials have in common.

    Raises:
        UserError: a setting of `sweep.trial` does not fit.
    """
    return overridden(base, {setting.key: setting.value for setting in base.sweep.trial}, "sweep.trial")


def num_trials(config: Config, space: Space) -> int:
    """How many trials a sweep has at most."""
    most = space.grid_size if config.sweep.searcher.kind == "grid" else None
    if config.sweep.trials == "auto":
        return most or TRIALS
    return min(config.sweep.trials, most or config.sweep.trials)


def check_space(base: Config) -> Space:
    """The space, after every value that it can suggest has been held against the config's types and bounds.

    Raises:
        UserError: all that is wrong with it.
    """
    space = Space.of(base)
    problems = [*_unknown_keys(base, space), *_unfit_verbs(base, space)]
    if not problems:
        problems = list(dict.fromkeys(_unfit_values(base, space)))
    if problems:
        raise UserError("\n".join(problems))
    return space


def _default_name(config: Config) -> str:
    if config.adapter.kind == "none":
        return "full"
    if config.adapter.kind != "lora" or config.adapter.path is not None:
        return "other"
    return "lora" if config.model.quantization == "none" else "qlora"


def _unknown_keys(base: Config, space: Space) -> Iterator[str]:
    for place, keys in ((WHERE, space.keys), ("sweep.trial", [s.key for s in base.sweep.trial])):
        for key in keys:
            if key.startswith(_NOT_SEARCHED):
                yield f"{key} ({place}): can't be set for a trial; set it for the whole sweep"
            elif key not in KEYS:
                names = suggestions(key)
                hint = f"did you mean {' or '.join(names)}?" if names else "--help lists all keys"
                yield f"{key} ({place}): unknown key; {hint}"
            elif place == WHERE and any(map(str.isdecimal, key.split("."))):
                yield f"{key} ({place}): is a part of a list, which is searched as a whole"
    if both := {s.key for s in base.sweep.trial} & set(space.keys):
        yield f"{', '.join(sorted(both))} (sweep.trial): is searched too; name it in one place only"


def _unfit_verbs(base: Config, space: Space) -> Iterator[str]:
    """What the searcher or the scheduler can't search."""
    searcher, scheduler = base.sweep.searcher.kind, base.sweep.scheduler.kind
    if not space.searched:
        yield f"{WHERE}: has formulas only; name a key with choices or a range"
    for d in space.searched:
        if searcher == "grid" and d.verb != "choice":
            yield f"{d.key} ({WHERE}): {d.verb} has no grid; give choices, or take searcher.kind=random"
        if searcher == "bayesopt" and d.verb == "choice":
            yield f"{d.key} ({WHERE}): bayesopt searches numbers, not choices; give a range, or take optuna"
    if scheduler in POPULATION and not mutable(space, scheduler):
        yield (
            f"sweep.scheduler.kind = {scheduler}: none of the searched keys can change while a trial goes on; search "
            f"{', '.join(MUTABLE)}" + (" over a range" if scheduler == "pb2" else "")
        )


MUTABLE = (
    "train.learning_rate",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.adam_beta1",
    "train.adam_beta2",
    "adapter.dropout",
)
"""Keys that a trial can go on with another value of."""


def mutable(space: Space, scheduler: str) -> list[Dimension]:
    """The searched keys that a population-based scheduler changes as trials go on; pb2 takes ranges only."""
    return [d for d in space.searched if d.key in MUTABLE and not (scheduler == "pb2" and d.verb == "choice")]


def _unfit_values(base: Config, space: Space) -> Iterator[str]:
    try:
        base = trial_base(base)
    except UserError as error:
        yield str(error)
    for key, values in space.corners():
        yield from (line for line in _problems(base, space, values) if line.startswith(key))
    # Those of one key alone are told; here are those of several that don't go together.
    together: dict[str, Values] = {}
    for values in _some_combinations(space):
        for line in _problems(base, space, values):
            together.setdefault(line, values)
    for line in list(together)[:_TOLD]:
        yield line


def _problems(base: Config, space: Space, values: Values) -> list[str]:
    lines: list[str] = []
    try:
        values = space.complete(base, values)
    except UserError as error:
        lines.append(str(error))
    try:
        overridden(base, values, WHERE)
    except UserError as error:
        lines += str(error).splitlines()
    return lines


def _some_combinations(space: Space) -> Iterator[Values]:
    dice = random.Random(0)
    for _ in range(_TRIED):
        yield {d.key: dice.choice(_samples(d)) for d in space.searched}


def _samples(dimension: Dimension) -> list[Any]:
    """Values that stand for all that can be drawn of a key."""
    if dimension.verb == "choice":
        return list(dimension.values)
    low, high = dimension.values[:2]
    if dimension.verb.endswith("randint"):
        return [low, high - 1]  # it ends before its upper bound
    if dimension.verb == "quniform":
        return [low, low + dimension.values[2], high]
    # Whole bounds must not hide that fractions are drawn between them.
    return [low, low + (high - low) / math.e, high]


def label(value: Any) -> Any:
    """A value as something that searchers can hash and compare."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def unlabelled(dimension: Dimension, drawn: Any) -> Any:
    """What a searcher drew, as a value of that key."""
    if dimension.verb != "choice":
        return drawn
    return next(
        value for value in dimension.values if label(value) == drawn and type(label(value)) is type(drawn)
    )


# ------------------------------------------------------------------------------------------- formulas


def _computed(dimension: Dimension, tree: Mapping[str, Any]) -> Any:
    formula = dimension.values[0]
    try:
        value = SandboxedEnvironment().compile_expression(formula, undefined_to_none=False)(**tree)
        # An unknown name gives an object that stands for it, and fails only when it is used; a section is no value, and
        # must not be put into itself.
        return json.loads(json.dumps(value))
    except Exception as error:  # whatever comes of what somebody wrote
        why = str(error).rstrip(".") or type(error).__name__
        raise UserError(
            f"{dimension.key} ({WHERE}): the formula {formula!r} has no value: {why}. "
            "Write dotted keys and arithmetic, such as 2 * adapter.r"
        ) from None


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[last] = list(value) if isinstance(value, tuple) else value


def shown(values: Mapping[str, Any]) -> str:
    """Values in a few words: the last part of each key, and short numbers."""
    parts: Sequence[str] = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in values.items()]
    return " ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
