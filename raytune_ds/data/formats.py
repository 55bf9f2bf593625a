"""Any row of a data set to one `Example`; what can't be used says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raytune_ds.data.conversation import Example, Message
from raytune_ds.data.demonstrations import READERS
from raytune_ds.data.preferences import is_labelled, kto, preference
from raytune_ds.data.values import RowError, kind_of, listed, near, without_nulls

__all__ = ["FORMATS", "Example", "Message", "RowError", "detect", "kind_of", "to_example"]

FORMATS: tuple[str, ...] = (
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "text",
    "preference",
    "kto",
)

_NEEDS = {
    "messages": "'messages': a list of {role, content}",
    "sharegpt": "'conversations': a list of {from, value}",
    "alpaca": "'instruction' and 'output' (and 'input', 'system', 'history')",
    "prompt-completion": "'prompt' and 'completion' or 'response'",
    "text": "'text'",
    "preference": "'chosen' and 'rejected', and a prompt as the other formats have it",
    "kto": "what the other formats need, and 'label' or 'kto_tag', true or false",
}
# each set of keys is enough; the first format that has one wins
_KEYS: dict[str, tuple[frozenset[str], ...]] = {
    "preference": (frozenset({"chosen", "rejected"}),),
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}), frozenset({"conversation"})),
    "alpaca": (frozenset({"instruction", "output"}),),
    "prompt-completion": (frozenset({"prompt", "completion"}), frozenset({"prompt", "response"})),
    "text": (frozenset({"text"}),),
}
_JUDGED = ("messages", "sharegpt", "alpaca", "prompt-completion")
_READERS = READERS | {"preference": preference, "kto": kto}


def detect(rows: Sequence[dict[str, Any]]) -> str:
    """The format of most of `rows`, the first hundred or so of a data set.

    Raises RowError where they are of none.
    """
    votes = Counter(format for format in map(_format_of, rows) if format)
    if not votes:
        raise RowError(_unknown_format(rows))
    return votes.most_common(1)[0][0]


def to_example(row: dict[str, Any], format: str) -> Example:
    """The example that `row` holds; `format` is one of FORMATS.

    Null values count as absent. Every assistant message is meant to be trained on, those within a 'prompt' included,
    but for those with a 'weight' of 0 (as OpenAI has it) or 'train' false. Messages after the last one that is trained
    on are cut off. Of rows that judge answers (preference, kto) no answer within the prompt is trained on. Raises
    RowError.
    """
    try:
        return _READERS[format](without_nulls(row))
    except RecursionError:
        raise RowError("its values are nested too deeply") from None


def _format_of(row: dict[str, Any]) -> str | None:
    keys = {key for key, value in row.items() if value is not None}
    format = next((name for name, sets in _KEYS.items() if any(needed <= keys for needed in sets)), None)
    return "kto" if format in _JUDGED and is_labelled(row) else format


def _unknown_format(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "there is no row to tell the format from"
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    known = sorted({key for sets in _KEYS.values() for needed in sets for key in needed} - set(keys))
    wrong = {wrong: key for key in known for wrong in near(key, keys)}
    hints = "".join(f" (did you mean '{key}' by {name!r}?)" for name, key in wrong.items())
    needs = "; ".join(f"{format} needs {_NEEDS[format]}" for format in FORMATS)
    return f"the format of the rows is not known: they have {listed(keys)}{hints}. {needs}"
