"""Rows to what the sides of one model make of them; the same in this process and in a worker of Ray Data."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from raytune_ds.data.thinking import CLOSE
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.evaluation.items import Item, Outcome
from raytune_ds.evaluation.losses import losses
from raytune_ds.evaluation.metrics import score
from raytune_ds.evaluation.subject import Subject, playing
from raytune_ds.generate import Generator
from raytune_ds.sampling import Sampling

Said = tuple[str, bool]
"""An answer, and whether its longest permitted length ended it."""


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
        self._subject = subject
        self._generator = Generator(subject.load(), load_tokenizer(tokenizer), ends=ends)
        self._model = self._generator.model
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
        said = iter(said_to(self._generator, [item for item in items if item.prompt]))
        return [
            self._outcome(item, [next(sums) for _ in item.sequences], next(said) if item.prompt else None)
            for item in items
        ]

    @staticmethod
    def _outcome(item: Item, sums: list[tuple[float, float]], said: Said | None) -> Outcome:
        loss, weight = (sum(values) for values in zip(*sums, strict=True))
        if said is None:
            return Outcome(loss, weight)
        text, is_cut_off = said
        return Outcome(loss, weight, text, is_cut_off, score(item.expected, text))

    def _require_known(self, items: Sequence[Item]) -> None:
        largest = max(max(sequence.ids) for item in items for sequence in item.sequences)
        if largest >= self._vocabulary:
            raise UserError(
                f"the base model does not know token {largest}, which training added to it, so that it can't be "
                "measured on these rows. --no-base measures the tuned model alone."
            )


def said_to(generator: Generator, asked: Sequence[Item]) -> list[Said]:
    """Greedy answers, without their reasoning. A prompt that fills the model's context is answered by nothing."""
    answers = {
        number: generator.ask(item.prompt, Sampling(max_new_tokens=item.max_new_tokens))
        for number, item in enumerate(asked)
        if len(item.prompt) < generator.context
    }
    if answers:
        generator.run(list(answers.values()))
    said = [answers.get(number) for number in range(len(asked))]
    return [
        ("", True) if answer is None else (without_reasoning(answer.text).strip(), answer.finish == "length")
        for answer in said
    ]


def without_reasoning(text: str) -> str:
    """What stands behind the end of a reasoning, if there is one."""
    return text.rpartition(CLOSE)[2]
