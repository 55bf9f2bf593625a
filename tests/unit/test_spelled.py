"""Tokens one by one: each with its own text, and what can't be seen made visible."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings

from raytune_ds.data.spelled import BROKEN, pieces, spelled, visible
from raytune_ds.data.template import Encoded
from tests.pages import TEXTS


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_texts_of_all_tokens_are_the_text(tiny_tokenizer: Any, text: str) -> None:
    """Whatever it is, and none is lost between two tokens; a character of several is whole, and with the first."""
    ids = tiny_tokenizer(text)["input_ids"]
    tokens = spelled(Encoded(ids, [1.0] * len(ids)), tiny_tokenizer)
    whole = tiny_tokenizer.decode(ids)
    assert [token.id for token in tokens] == ids
    if BROKEN not in text:
        assert "".join(piece.text for token in tokens for piece in token.pieces) == visible(whole)


def test_a_character_of_several_tokens_is_shown_once(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("a😀b")["input_ids"]
    tokens = spelled(Encoded(ids, [1.0] * len(ids)), tiny_tokenizer)
    assert len(ids) > 3
    assert ["".join(piece.text for piece in token.pieces) for token in tokens] == [
        "a",
        "😀",
        *[""] * (len(ids) - 3),
        "b",
    ]


def test_a_character_that_was_broken_before_stays_so(tiny_tokenizer: Any) -> None:
    """Half a character at the end of a sequence that was cut."""
    ids = tiny_tokenizer("a😀")["input_ids"][:-1]
    tokens = spelled(Encoded(ids, [1.0] * len(ids)), tiny_tokenizer)
    assert [piece.text for piece in tokens[0].pieces] == ["a"]
    assert all(piece.text == BROKEN for token in tokens[1:] for piece in token.pieces)


def test_what_follows_a_broken_character_is_shown_with_its_own_token(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("😀")["input_ids"][:1] + tiny_tokenizer("b")["input_ids"]
    tokens = spelled(Encoded(ids, [1.0, 1.0]), tiny_tokenizer)
    assert [piece.text for token in tokens for piece in token.pieces] == [BROKEN, "b"]


def test_control_tokens_are_told_from_text_that_looks_like_them(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.eos_token_id
    ids = [end, *tiny_tokenizer("<")["input_ids"]]
    assert [token.control for token in spelled(Encoded(ids, [1.0, 1.0]), tiny_tokenizer)] == [True, False]


def test_what_can_not_be_seen_is_spelled() -> None:
    found = [tuple(piece) for piece in pieces("a  b\n\n\t\r\u202ec\xa0\u3164")]
    assert found == [
        ("text", "a"),
        ("space", "  "),
        ("text", "b"),
        ("newline", "\n"),
        ("newline", "\n"),
        ("tab", "\t"),
        ("code", "U+000D"),
        ("code", "U+202E"),
        ("text", "c"),
        ("code", "U+00A0"),
        ("code", "U+3164"),
    ]
