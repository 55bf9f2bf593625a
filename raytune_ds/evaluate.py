"""Task scores by generation: how often a model's answer is exactly the expected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_ds.generate import Generator, Sampling


@dataclass(frozen=True)
class Score:
    """Exact match over some questions.

    Attributes:
        num_questions: asked.
        num_exact: answered exactly, apart from spaces at the ends.
        misses: (question, expected, given) of some that were not.
    """

    num_questions: int
    num_exact: int
    misses: tuple[tuple[str, str, str], ...]

    @property
    def exact_match(self) -> float:
        """The share answered exactly, from 0 to 1."""
        return self.num_exact / self.num_questions


def exact_match(generator: Generator, pairs: Sequence[tuple[str, str]], shown_misses: int = 5) -> Score:
    """Asks every question, greedily decoded, and compares.

    Args:
        generator: the model.
        pairs: (question, expected answer).
        shown_misses: how many wrong answers to keep.
    """
    longest = max(len(generator.tokenizer(answer)["input_ids"]) for _, answer in pairs)
    conversations = [[{"role": "user", "content": question}] for question, _ in pairs]
    given = generator.answer(conversations, Sampling(max_new_tokens=longest + 4), batch_size=64)
    rows = [(q, expected, g.strip()) for (q, expected), g in zip(pairs, given, strict=True)]
    misses = [row for row in rows if row[1].strip() != row[2]]
    return Score(len(rows), len(rows) - len(misses), tuple(misses[:shown_misses]))
