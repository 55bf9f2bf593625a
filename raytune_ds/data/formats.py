"""Any row of a data set to one `Example`; what can't be used says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raytune_ds.data.conversation import Example, Message
from raytune_ds.data.demonstrations import READERS
from raytune_ds.data.values import RowError, kind_of, listed, near, without_nulls

__all__ = ["FORMATS", "Example", "Message", "RowError", "detect", "kind_of", "to_example"]

FORMATS: tuple[str, ...] = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")

_NEEDS = {
    "messages": "'messages': a list of {role, content}",
    "sharegpt": "'conversations': a list of {from, value}",
    "alpaca": "'instruction' and 'output' (and 'input', 'system', 'history')",
    "prompt-completion": "'prompt' and 'completion' or 'response'",
    "text": "'text'",
}
# each set of keys is enough; the first format that has one wins
_KEYS: dict[str, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}), frozenset({"conversation"})),
    "alpaca": (frozenset({"instruction", "output"}),),
    "prompt-completion": (frozenset({"prompt", "completion"}), frozenset({"prompt", "response"})),
    "text": (frozenset({"text"}),),
}
# kinds of rows that `detect` knows and no objective trains on yet: support for one begins here
_FOR_NO_OBJECTIVE = {
    "preference": "preference rows (a chosen and a rejected answer each)",
    "kto": "KTO rows (an answer and whether it is desirable each)",
}


def detect(rows: Sequence[dict[str, Any]]) -> str:
    """The format of most of `rows`, the first hundred or so of a data set.

    Raises RowError where they are of none, or are preference or KTO rows.
    """
    votes = Counter(format for format in map(_format_of, rows) if format)
    if not votes:
        raise RowError(_unknown_format(rows))
    winner = votes.most_common(1)[0][0]
    if winner in _FOR_NO_OBJECTIVE:
        raise RowError(
            f"these are {_FOR_NO_OBJECTIVE[winner]}; the objective sft trains on demonstrations (a prompt and the"
            " one answer to learn), pretrain on raw text. To train on one of their columns all the same, name its"
            " format"
        )
    return winner


def to_example(row: dict[str, Any], format: str) -> Example:
    """The example that `row` holds; `format` is one of FORMATS.

    Null values count as absent. Every assistant message is meant to be trained on, those within a 'prompt' included,
    but for those with a 'weight' of 0 (as OpenAI has it) or 'train' false. Messages after the last one that is trained
    on are cut off. Raises RowError.
    """
    try:
        return READERS[format](without_nulls(row))
    except RecursionError:
        raise RowError("its values are nested too deeply") from None


def _format_of(row: dict[str, Any]) -> str | None:
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if isinstance(row.get("label"), bool) and keys & {"messages", "conversations", "conversation", "prompt"}:
        return "kto"
    return next((format for format in FORMATS if any(needed <= keys for needed in _KEYS[format])), None)


def _unknown_format(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "there is no row to tell the format from"
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    known = sorted({key for sets in _KEYS.values() for needed in sets for key in needed} - set(keys))
    wrong = {wrong: key for key in known for wrong in near(key, keys)}
    hints = "".join(f" (did you mean '{key}' by {name!r}?)" for name, key in wrong.items())
    needs = "; ".join(f"{format} needs {_NEEDS[format]}" for format in FORMATS)
    return f"the format of the rows is not known: they have {listed(keys)}{hints}. {needs}"
