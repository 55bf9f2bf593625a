"""A later turn's ids are those of the turn before and more, or it is looked at as a whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from raytune_ds.data.turntokens import RenderedTurn, TurnTokens

END = "<e>"


class Letters:
    """A tokenizer of one token a character, but for two newlines, and an end token that it cuts texts at."""

    def __init__(self, cuts: bool = True) -> None:
        self.added = re.compile(re.escape(END))
        self._cuts = cuts
        self.seen: list[str] = []

    def token_id(self, token: str) -> int:
        return 0

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        self.seen += texts
        pieces = [re.findall(f"{END}|\n\n|[\\s\\S]", text) for text in texts]
        return [[self._id(piece, text) for piece in found] for text, found in zip(texts, pieces, strict=True)]

    def _id(self, piece: str, text: str) -> int:
        if piece == END:
            return 0
        return 1 if piece == "\n\n" else ord(piece) + (0 if self._cuts else 1000 * (END in text))


def turns_of(first: str, role: str = "assistant\n") -> tuple[RenderedTurn, RenderedTurn]:
    before = RenderedTurn(f"u{END}{role}", first + END, "")
    return before, RenderedTurn(f"{before.whole}v{END}{role}", "x" + END, "")


def behind(literals: Letters, *turns: RenderedTurn) -> list[int] | None:
    tokens = TurnTokens(literals)  # type: ignore[arg-type]
    return tokens.behind(*turns, tokens.of([turns]))


@pytest.mark.parametrize("role", ["assistant\n", ""])
def test_what_stands_behind_the_turn_before_is_tokenized_alone(role: str) -> None:
    literals = Letters()
    before, turn = turns_of("hi", role)
    assert behind(literals, before, turn) == Letters().ids([f"v{END}{role}"])[0]
    assert turn.context not in literals.seen


def test_an_answer_that_grows_together_with_its_role_is_not_what_the_next_turn_begins_with() -> None:
    """A newline behind the role and one before the answer are a single token together."""
    before, turn = turns_of("\nhi")
    whole = Letters().ids([turn.context])[0]
    apart = [token for part in Letters().ids([before.context, before.answer]) for token in part]
    assert whole[: len(apart)] != apart
    assert behind(Letters(), before, turn) is None


@pytest.mark.parametrize("first", ["hi", "\nhi"])
def test_a_tokenizer_that_does_not_cut_at_its_tokens_is_asked_for_the_whole(first: str) -> None:
    literals = Letters(cuts=False)
    before, turn = turns_of(first)
    found: Any = behind(literals, before, turn)
    assert turn.context in literals.seen
    begun = [token for part in literals.ids([before.context, before.answer]) for token in part]
    whole = literals.ids([turn.context])[0]
    assert found == (whole[len(begun) :] if whole[: len(begun)] == begun else None)


def test_another_context_is_no_continuation() -> None:
    before, _ = turns_of("hi")
    assert behind(Letters(), before, RenderedTurn(f"w{END}", "x" + END, "")) is None
