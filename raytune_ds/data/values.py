"""JSON values of rows, and what is said of those that are not what they must be."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

# lists and objects in one another; what renders them needs a few frames of Python's stack for each
_DEEPEST = 100


class RowError(ValueError):
    """Why a row can't be used, in words that make sense behind 'file, row N: '."""


def kind_of(value: object) -> str:
    """What a JSON value is, with its article: 'a list'."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def near(key: str, keys: Sequence[str]) -> list[str]:
    """The one of `keys` that was likely meant to be `key`, if there is one."""
    lowered = {str(name).lower(): str(name) for name in keys}
    return [lowered[name] for name in difflib.get_close_matches(key, lowered, n=1, cutoff=0.75)]


def listed(keys: Sequence[str], most: int = 10) -> str:
    """The keys of a row, in words."""
    if not keys:
        return "no keys at all"
    # repr also makes broken Unicode in a key printable
    shown = ", ".join(repr(str(key)[:40]) for key in keys[:most])
    return f"the keys {shown}{' ...' if len(keys) > most else ''}"


def without_nulls(value: Any) -> Any:
    """Without null members of objects, at any depth: Parquet and `datasets` fill missing keys with them."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def need(row: dict[str, Any], *keys: str, where: str = "the row") -> Any:
    """The value of the first of `keys` that `row` has."""
    for key in keys:
        if key in row:
            return row[key]
    meant = [(key, name) for key in keys for name in near(key, list(row))]
    hint = f" (did you mean '{meant[0][0]}' by {meant[0][1]!r}?)" if meant else ""
    wanted = " or ".join(f"'{key}'" for key in keys)
    raise RowError(f"{where} has no {wanted}, it has {listed(list(row))}{hint}")


def as_string(value: object, what: str) -> str:
    """`value`, which must be a string; `what` is what to call it."""
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind_of(value)}, expected a string")
    return value


def as_list(value: object, what: str) -> list[Any]:
    """`value`, which must be a list; `what` is what to call it."""
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind_of(value)}, expected a list")
    return value


def as_object(value: object, what: str) -> dict[str, Any]:
    """`value`, which must be an object; `what` is what to call it."""
    if not isinstance(value, dict):
        raise RowError(f"{what} is {kind_of(value)}, expected an object")
    return value


def unpacked(value: Any, what: str) -> Any:
    """A value that may come as a string of JSON; nulls within the string are meant and stay."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowError(f"{what} is not valid JSON: {error}") from None


def check_unicode(value: Any, what: str, levels: int = _DEEPEST) -> None:
    """Whether every string in `value`, at any depth, can be encoded.

    Raises:
        RowError: one can't, or `value` has more than so many levels.
    """
    if levels < 0:
        raise RowError(f"its values are nested too deeply: more than {_DEEPEST} levels")
    if isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, dict):
        for key, member in value.items():
            check_unicode(key, what)
            check_unicode(member, what, levels - 1)
    elif isinstance(value, list):
        for item in value:
            check_unicode(item, what, levels - 1)


def _check_text(text: str, what: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        raise RowError(f"{what} is not valid Unicode: lone surrogate {surrogate}") from None
