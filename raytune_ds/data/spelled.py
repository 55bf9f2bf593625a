"""Tokens one by one as a person can tell them apart: whose text is whose, and what else can't be seen made visible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from raytune_ds.data.template import Encoded

LONGEST = 8
"""Tokens that may be one piece of text together: the bytes of a rare character, and of its neighbours."""
BROKEN = "\ufffd"
_WHITE = {" ": "space", "\n": "newline", "\t": "tab"}
_BLANK = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0") | {chr(n) for n in range(0xE0100, 0xE01F0)}
"""Printable for Unicode, yet nothing is to be seen of them."""


class Piece(NamedTuple):
    """Text of one kind: text, space, newline, tab, or the code of a character that can't be seen."""

    kind: str
    text: str


@dataclass(frozen=True)
class Token:
    """As it is shown; no pieces if its text is shown with the token before it.

    Attributes:
        control: whether it is one of the tokenizer's added tokens, such as those of the chat template.
    """

    id: int
    weight: float
    control: bool
    pieces: tuple[Piece, ...]


def spelled(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """All tokens of a sequence; their texts, one after the other, are the text of the sequence."""
    added, texts = tokenizer.added_tokens_decoder.keys(), _texts(encoded.ids, tokenizer)
    return [
        Token(token, weight, token in added, tuple(pieces(text)))
        for token, weight, text in zip(encoded.ids, encoded.weights, texts, strict=True)
    ]


def pieces(text: str) -> Iterator[Piece]:
    """Runs of a kind; each line break and each character that can't be seen for itself."""
    for kind, run in groupby(text, key=_kind):
        if kind in ("newline", "code"):
            yield from (Piece(kind, _visible(character)) for character in run)
        else:
            yield Piece(kind, "".join(run))


def visible(text: str) -> str:
    """The text with a code such as U+202E for each character that can't be seen, or turns others around."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    return f"U+{ord(character):04X}" if _kind(character) == "code" else character


def _kind(character: str) -> str:
    seen = character.isprintable() and character not in _BLANK
    return _WHITE.get(character) or ("text" if seen else "code")


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """For each token its text; empty where it is only text together with the one before it."""
    before: list[int] = []
    start = 0
    while start < len(ids):
        group, text = _next_group(before, ids[start : start + LONGEST], tokenizer)
        yield text
        yield from [""] * (len(group) - 1)
        before, start = group, start + len(group)


def _next_group(
    before: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str]:
    """The fewest tokens that are text, and what it is."""
    alone = _behind(before, ids[:1], tokenizer)
    for size in range(1, len(ids) + 1):
        text = _behind(before, ids[:size], tokenizer)
        if not text.endswith(BROKEN):
            # A broken character that was in the data goes on being one, whatever follows.
            completed = size == 1 or not text.startswith(alone)
            return (ids[:size], text) if completed else (ids[:1], alone)
    return ids[:1], alone


def _behind(before: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens where they stand: some tokenizers leave out the space that a text begins with."""
    context, both = _decoded(before, tokenizer), _decoded(before + ids, tokenizer)
    return both.removeprefix(context) if both.startswith(context) else _decoded(ids, tokenizer)


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
