"""Rendered turns to token ids, all of many conversations together, and no text of a conversation twice.

A later turn's context repeats the turns before it. Its ids begin with theirs if the tokenizer makes the same of the
whole as of its parts, which it does behind a control token: it cuts a text there before it looks at it. That is tried
once for each token. Where other text stands between the control token and the answer, as a role does in ChatML, the
two are looked at together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import NamedTuple

from raytune_ds.data.literal import Literals

_BEHIND = ("x", " x", "\n", "\n\nx", "好", "!")


class RenderedTurn(NamedTuple):
    """What is seen when serving, what is to be answered, and what became of its reasoning."""

    context: str
    answer: str
    fate: str

    @property
    def whole(self) -> str:
        """What the next turn's context begins with, if the template keeps it."""
        return self.context + self.answer


class TurnTokens:
    """Token ids of rendered turns by one tokenizer."""

    def __init__(self, literals: Literals) -> None:
        """`literals` tokenizes."""
        self._literals = literals
        self._cuts = cache(self._is_cut_at)

    def of(self, conversations: Sequence[Sequence[RenderedTurn]]) -> dict[str, list[int]]:
        """The ids of all texts that the other methods need, by text."""
        texts = list(dict.fromkeys(text for turns in conversations for text in self._texts(turns)))
        return dict(zip(texts, self._literals.ids(texts), strict=True))

    def context_ids(self, turn: RenderedTurn, tokens: Mapping[str, list[int]]) -> list[int]:
        """All ids of a turn's context."""
        found = tokens.get(turn.context)
        return found if found is not None else self._literals.ids([turn.context])[0]

    def behind(
        self, before: RenderedTurn, turn: RenderedTurn, tokens: Mapping[str, list[int]]
    ) -> list[int] | None:
        """The ids that a turn's context has behind those of the turn before, where it begins with them; else None."""
        if self._goes_on(before, turn):
            tail = self._tail(before.context)
            joined = not tail or tokens[tail + before.answer] == tokens[tail] + tokens[before.answer]
            return tokens[turn.context[len(before.whole) :]] if joined else None
        begun = [*self.context_ids(before, tokens), *tokens[before.answer]]
        whole = self.context_ids(turn, tokens)
        return whole[len(begun) :] if whole[: len(begun)] == begun else None

    def _texts(self, turns: Sequence[RenderedTurn]) -> Iterator[str]:
        before = None
        for turn in turns:
            yield turn.answer
            if before is not None and self._goes_on(before, turn):
                yield turn.context[len(before.whole) :]
                if tail := self._tail(before.context):
                    yield from (tail, tail + before.answer)
            else:
                yield turn.context
            before = turn

    def _goes_on(self, before: RenderedTurn, turn: RenderedTurn) -> bool:
        """Whether a turn's context is the turn before and more, which the tokenizer looks at apart."""
        if not turn.context.startswith(before.whole):
            return False
        ends = list(self._added.finditer(before.answer))
        return bool(ends) and ends[-1].end() == len(before.answer) and self._cuts(ends[-1].group())

    def _tail(self, context: str) -> str:
        """What stands behind the last control token."""
        last = 0
        for found in self._added.finditer(context):
            if self._cuts(found.group()):
                last = found.end()
        return context[last:]

    def _is_cut_at(self, token: str) -> bool:
        texts = [f"a{token}", *(f"a{token}{text}" for text in _BEHIND), *_BEHIND]
        first, *others = self._literals.ids(texts)
        if first[-1:] != [self._literals.token_id(token)]:
            return False
        together, apart = others[: len(_BEHIND)], others[len(_BEHIND) :]
        return all(whole == first + part for whole, part in zip(together, apart, strict=True))

    @cached_property
    def _added(self) -> re.Pattern[str]:
        return self._literals.added
