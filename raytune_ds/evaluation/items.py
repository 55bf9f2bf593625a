"""What a model is asked about one row, and what came of it: plain values, that travel to workers and back as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

BASE, TUNED = "base", "tuned"
"""The model before and after training, the two sides of every comparison."""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, and for each its weight as a target; that of the first counts for nothing."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Item:
    """One row.

    Attributes:
        sequences: of which the loss is measured.
        prompt: token ids that are to be answered; empty if no answer is asked.
        expected: the answer that is compared with.
    """

    sequences: list[TokenSequence]
    prompt: list[int] = field(default_factory=list)
    expected: str = ""
    max_new_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """That the model reads or may write."""
        return sum(len(s.ids) for s in self.sequences) + len(self.prompt) + self.max_new_tokens

    def to_json(self) -> str:
        """For the way to a worker."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Item:
        """The way back from `to_json`."""
        values = json.loads(text)
        values["sequences"] = [TokenSequence(**sequence) for sequence in values["sequences"]]
        return Item(**values)


@dataclass(frozen=True)
class Outcome:
    """What one side made of a row.

    Attributes:
        loss: the sum of weighted negative log-likelihoods of its supervised tokens, in nats.
        weight: the sum of their weights.
        answer: without reasoning and special tokens; None if none was asked.
        is_cut_off: whether the answer was ended by its longest permitted length.
        scores: of the answer, by metric.
    """

    loss: float
    weight: float
    answer: str | None = None
    is_cut_off: bool = False
    scores: dict[str, float] = field(default_factory=dict)


def to_json(outcomes: dict[str, Outcome]) -> str:
    """What the sides made of a row, for the way back to the driver."""
    return json.dumps({side: asdict(outcome) for side, outcome in outcomes.items()})


def from_json(text: str) -> dict[str, Outcome]:
    """The way back from `to_json`."""
    return {side: Outcome(**values) for side, values in json.loads(text).items()}
