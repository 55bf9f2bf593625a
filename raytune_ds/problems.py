"""What pydantic has against a config, in sentences that name the key, its value and where that came from."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from raytune_ds.aliases import ABSENT, close, suggestions
from raytune_ds.config import SourceConfig
from raytune_ds.keys import KeyPath, field, list_around, section_of
from raytune_ds.section import SECRET_NAME, holds_credentials

Where = Callable[[KeyPath], str]

_TYPE_PHRASES = {
    "bool": "true or false",
    "finite": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "string": "text",
    "tuple": "a list",
}
_BOUND_PHRASES = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def told(error: ValidationError, tree: Mapping[str, Any], where: Where) -> Iterator[str]:
    """One line for each key of `tree` that is wrong; the branches of a union are told together."""
    by_path: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            yield from _unknown(tuple(map(str, item["loc"])), item["input"], where)
        else:
            by_path.setdefault(_error_path(item), []).append(item)
    for path, items in by_path.items():
        if list_around(path) and not _value_at(tree, path):
            path = path[:-1]  # a single entry given without a list around it
        yield f"{shown_key(path)}{_value_at(tree, path)} ({where(path)}): {_message(path, items)}"


def shown_key(path: KeyPath) -> str:
    """A key as it is written, cut where nobody would read on."""
    return shortened(".".join(part or '""' for part in path), 80)


def shortened(text: str, length: int = 60) -> str:
    """Text of at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _error_path(item: Any) -> KeyPath:
    """The key of a pydantic error: its location without the union branches pydantic adds."""
    path: KeyPath = ()
    for part in item["loc"]:
        longer = (*path, str(part))
        if not (field(longer) or list_around(longer)):
            break
        path = longer
    return (*path, item["ctx"]["key"]) if item["type"] == "about" else path


def _unknown(path: KeyPath, value: Any, where: Where) -> Iterator[str]:
    """A line for an unknown key, or for each key of an unknown section. Never with its value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _unknown((*path, name), inner, where)
        return
    if any("." in part for part in path):
        parts = ".".join(path).split(".")
        nested = ": {".join(parts) + ": ..." + "}" * (len(parts) - 1)
        hint = f"dots are for the command line, in a file write sections: {shortened(nested)}"
    elif SECRET_NAME.search(path[-1]):
        hint = "secrets do not belong in a config, set them in the environment of the nodes"
    elif path[-1] in ABSENT:
        hint = ABSENT[path[-1]]
    elif names := suggestions(".".join(path)):
        hint = f"did you mean {' or '.join(names)}?"
    else:
        hint = "--help lists all keys"
    yield f"{shown_key(path)} ({where(path)}): unknown key; {hint}"


def _message(path: KeyPath, items: Sequence[Any]) -> str:
    """What is wrong with one key, from the errors of all branches of its type."""
    kind, context = items[0]["type"], items[0].get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "about":
        return str(context["message"])
    if kind == "missing":
        return "is missing"
    if kind in ("model_type", "model_attributes_type"):
        return _section_message(path)
    if kind == "string_unicode":
        return "has characters that are not valid Unicode"
    phrases = list(dict.fromkeys(phrase for item in items for phrase in _phrase(item).split(" or ")))
    info = field(path)
    if info is not None and NoneType in get_args(info.annotation):
        phrases.append("null")
    return f"must be {_either(phrases)}{_hint(items)}"


def _section_message(path: KeyPath) -> str:
    info = field(path)
    model = (section_of(info) if info else None) or SourceConfig
    main = next((name for name in ("kind", "name") if name in model.model_fields), None)
    hint = f"; did you mean {shown_key((*path, main))}?" if main else ""
    return f"must be a section with keys ({', '.join(model.model_fields)}){hint}"


def _phrase(item: Any) -> str:
    """A few words that finish the sentence 'must be ...'."""
    kind, context = item["type"], item.get("ctx", {})
    for name, words in _BOUND_PHRASES.items():
        if name in context:
            return f"{words} {context[name]:.12g}"
    if kind == "literal_error":
        return _either(_choices(item))
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters long"
    if kind == "string_too_short":
        return "some text, not empty"
    return _TYPE_PHRASES.get(kind.partition("_")[0], item["msg"].removeprefix("Input should be "))


def _hint(items: Sequence[Any]) -> str:
    """What to do about a misspelt choice, or a number where text is wanted."""
    for item in items:
        if item["type"] == "string_type" and isinstance(item["input"], (int, float)):
            return "; put the value in quotes"
        if item["type"] == "literal_error" and isinstance(item["input"], str):
            near = close(item["input"].lower(), _choices(item), 0.6)
            if near:
                return f"; did you mean {near[0]}?"
    return ""


def _choices(item: Any) -> list[str]:
    return re.findall(r"'([^']*)'", item["ctx"]["expected"])


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _value_at(tree: Any, path: KeyPath) -> str:
    """' = value' as it was given, or nothing where there is none or it must not be shown."""
    for part in path:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return ""
    if isinstance(tree, dict):  # a collection may hold anything, a misplaced secret included
        return " = a mapping"
    if isinstance(tree, list):
        return " = a list"
    if isinstance(tree, str) and holds_credentials(tree):
        return ""
    plain = isinstance(tree, str) and re.fullmatch(r"[^\s\"']+", tree)
    return f" = {shortened(tree if plain else json.dumps(tree, ensure_ascii=False))}"
