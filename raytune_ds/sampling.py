"""How the tokens of answers are chosen: settings by their Hugging Face names, and the logits processor of a batch.

Every row of a batch has settings and random numbers of its own, so that an answer is the same in whatever company.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raytune_ds.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the names and meanings are those of `GenerationConfig`.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: samples from the smallest set of tokens with this much probability.
        top_k: samples from this many likeliest tokens; 0 from all.
        min_p: leaves out tokens with less than this share of the likeliest one's probability.
        repetition_penalty: above 1, tokens that are there already become less likely; for greedy decoding too.
        seed: of the random numbers; None takes others each time.
        stop: texts that end an answer, and are not part of it.

    Raises:
        UserError: a value that makes no sense.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Holds the values against what they may be."""
        for name, fine, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and 1 at most"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 on, below 2**63"),
            ("stop", all(self.stop), "no empty text"),
        ):
            if not fine:
                raise UserError(f"{name} = {getattr(self, name)!r}: {wanted} is wanted.")

    def warpers(self) -> LogitsProcessorList:
        """What makes scores to those that are sampled from, in the order in which transformers applies it."""
        chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p:
            chosen.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(chosen)

    def generator(self, position: int, device: torch.device) -> torch.Generator:
        """Random numbers for the answer at this position among those that are asked for together."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return torch.Generator(device).manual_seed((seed + position) % 2**63)


class RowSampler(LogitsProcessor):
    """Has greedy decoding choose what each row's own settings would sample.

    The likeliest token of scores to which Gumbel noise was added is a sample of them.
    """

    def __init__(self, rows: Sequence[tuple[Sampling, torch.Generator, int]]) -> None:
        """`rows` says of each its settings, its random numbers, and how many tokens of padding it begins with."""
        self._rows = [
            (sampling, sampling.warpers() if sampling.temperature else None, generator, padding)
            for sampling, generator, padding in rows
        ]
        self._are_plain = all(s.temperature == 0 and s.repetition_penalty == 1 for s, _, _ in rows)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores whose likeliest token is the one to take."""
        if self._are_plain:
            return scores
        return torch.cat(
            [self._chosen(row, input_ids[i : i + 1], scores[i : i + 1]) for i, row in enumerate(self._rows)]
        )

    @staticmethod
    def _chosen(row: Any, ids_1T: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        sampling, warpers, generator, padding = row
        if sampling.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
            scores_1V = penalty(ids_1T[:, padding:], scores_1V)
        if warpers is None:
            return scores_1V
        warped_1V = warpers(ids_1T, scores_1V)
        return warped_1V - torch.empty_like(warped_1V).exponential_(generator=generator).log()
