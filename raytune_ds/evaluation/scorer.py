"""Rows to what the sides of one model make of them; the same in this process and in a worker of Ray Data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.evaluation.answers import answers
from raytune_ds.evaluation.items import Item, Outcome
from raytune_ds.evaluation.losses import losses
from raytune_ds.evaluation.metrics import score
from raytune_ds.evaluation.subject import Subject, playing


class Scorer:
    """Holds a loaded model."""

    def __init__(self, subject: Subject, tokenizer: TokenizerSpec, ends: Collection[int]) -> None:
        """Loads it.

        Args:
            subject: the model, and the sides it plays.
            tokenizer: of the prompts.
            ends: tokens that end an answer.

        Raises:
            UserError: it can't be loaded.
        """
        self._subject, self._ends = subject, ends
        self._model, self._tokenizer = subject.load(), load_tokenizer(tokenizer)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings

    def score(self, items: Sequence[Item]) -> list[dict[str, Outcome]]:
        """For each row what each side makes of it.

        Raises:
            UserError: the model does not know a token.
        """
        self._require_known(items)
        found: list[dict[str, Outcome]] = [{} for _ in items]
        for side in self._subject.sides:
            with playing(self._model, side):
                for outcomes, outcome in zip(found, self._side(items), strict=True):
                    outcomes[side] = outcome
        return found

    def _side(self, items: Sequence[Item]) -> list[Outcome]:
        sums = iter(losses(self._model, [sequence for item in items for sequence in item.sequences]))
        asked = [item for item in items if item.prompt]
        said = iter(self._answers(asked))
        return [self._outcome(item, [next(sums) for _ in item.sequences], said) for item in items]

    def _answers(self, asked: Sequence[Item]) -> list[Any]:
        if not asked:
            return []
        prompts, limits = [item.prompt for item in asked], [item.max_new_tokens for item in asked]
        return answers(self._model, self._tokenizer, prompts, self._ends, limits)

    @staticmethod
    def _outcome(item: Item, sums: list[tuple[float, float]], said: Any) -> Outcome:
        loss, weight = (sum(values) for values in zip(*sums, strict=True))
        if not item.prompt:
            return Outcome(loss, weight)
        answer = next(said)
        return Outcome(loss, weight, answer.text, answer.is_cut_off, score(item.expected, answer.text))

    def _require_known(self, items: Sequence[Item]) -> None:
        largest = max(max(sequence.ids) for item in items for sequence in item.sequences)
        if largest >= self._vocabulary:
            raise UserError(
                f"the base model does not know token {largest}, which training added to it, so that it can't be "
                "measured on these rows. --no-base measures the tuned model alone."
            )
