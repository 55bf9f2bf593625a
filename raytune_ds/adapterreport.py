"""What an adapter trains of a model and what it does not, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ds.console import human_bytes, human_count

# Of a trained parameter: itself, its gradient and AdamW's two moments, in float32.
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Group:
    """Matrices of one kind, over all layers.

    Attributes:
        part: of the model.
        name: the last part of the module's or parameter's name.
        count: how many of them the model has.
        layers: how many layers they are in.
        shape: of one of them, as text.
        num_parameters: of the base model, all of them together.
        ranks: of the adapter; empty where there is none, or it has no rank.
        trained: parameters of the adapter.
        note: why there is no adapter, or what is to be known of it.
    """

    part: str
    name: str
    count: int
    layers: int
    shape: str
    num_parameters: int
    ranks: tuple[int, ...]
    trained: int
    note: str


@dataclass(frozen=True)
class AdapterReport:
    """What is trained and what is not.

    Attributes:
        trainable: parameters.
        total: of the model, adapter included.
        adapted: groups with an adapter.
        left_alone: the others.
        whole: modules that are trained whole beside the adapter.
        widest_bare: elements of the largest matrix that is adapted as a bare parameter in peft's own way.
        unserved: why vLLM can't serve it as it is.
    """

    trainable: int
    total: int
    adapted: tuple[Group, ...] = ()
    left_alone: tuple[Group, ...] = ()
    whole: tuple[str, ...] = ()
    widest_bare: int = 0
    unserved: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """As a person reads it."""
        share = 100 * self.trainable / self.total
        head = (
            f"{human_count(self.trainable)} of {human_count(self.total)} parameters are trained ({share:.2f}%); with "
            f"gradients and optimizer they take {human_bytes(TRAINED_BYTES * self.trainable)}"
        )
        return [head, *_table(self.adapted), *_beside(self), *_alone(self.left_alone)]


def _table(groups: Sequence[Group]) -> list[str]:
    rows = [
        (
            group.part,
            f"{group.name} x{group.count}",
            group.shape,
            _rank(group),
            human_count(group.trained),
            group.note,
        )
        for group in groups
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    return [
        "  "
        + "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]


def _rank(group: Group) -> str:
    return (
        f"r {' to '.join(str(r) for r in dict.fromkeys((min(group.ranks), max(group.ranks))))}"
        if group.ranks
        else ""
    )


def _beside(report: AdapterReport) -> list[str]:
    lines = []
    if report.whole:
        lines.append(f"  trained whole: {', '.join(report.whole)}")
    if report.widest_bare:
        lines.append(
            "  bare parameters: of some, peft adds the adapter to the matrix itself, and the backward pass makes the "
            f"gradient of all of it, up to {human_count(report.widest_bare)} elements at a time"
        )
    if report.unserved:
        lines.append(
            "  vLLM can't serve it as it is; raytune-ds export --to merged makes a model that it can:"
        )
        lines += [f"    {reason}" for reason in report.unserved]
    return lines


def _alone(groups: Sequence[Group]) -> list[str]:
    reasons: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        reasons.setdefault(group.note, {}).setdefault(group.part, []).append(f"{group.name} x{group.count}")
    lines = []
    for why, parts in reasons.items():
        told = "; ".join(f"{part} {', '.join(names)}" for part, names in parts.items())
        lines.append(f"  not adapted: {told} ({why})")
    return lines
