"""Keys and kinds: unknown keys and values of another kind are refused, and what stands in quotes is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from raytune_ds.aliases import ALIASES, close
from raytune_ds.engines.ds.keys import AUTO, SECTIONS, TOP_KEYS, ZERO, ZERO_KEYS
from raytune_ds.engines.ds.work import Work, shown
from raytune_ds.problems import shortened

_KIND_PHRASES = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "text",
    "section": "a section in braces",
    "list": "a list",
}


def as_flag(value: Any) -> Any:
    """True, False or "auto"; None: it is none of these."""
    if isinstance(value, bool) or value == AUTO:
        return value
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def as_number(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            value = float(value) if len(value) <= 40 else math.nan
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -1e300 < value < 1e300 else None  # nor infinity, nor NaN


def as_whole(value: Any) -> int | None:
    number = as_number(value)
    return int(number) if number is not None and number == int(number) >= 0 else None


_READ: dict[str, Callable[[Any], Any]] = {
    "flag": as_flag,
    "whole": as_whole,
    "number": as_number,
    "text": lambda value: value if isinstance(value, str) else None,
    "section": lambda value: value if isinstance(value, dict) else None,
    "list": lambda value: value if isinstance(value, list) else None,
    "anything": lambda value: value,
}


def enabled(section: Any) -> bool:
    """Whether a section with the key `enabled`, false where it is missing, switches something on."""
    enabled = section.get("enabled", False) if isinstance(section, dict) else section
    return bool(enabled) and as_flag(enabled) in (True, None)


def read_sections(work: Work) -> None:
    """Refuses unknown keys and values of another kind; numbers and flags in quotes are taken for what they are."""
    for section, kinds in SECTIONS.items():
        read_section(work, section, kinds)


def read_section(work: Work, section: str, kinds: Mapping[str, str], others: bool = False) -> None:
    """`others`: keys that are not in `kinds` may stand there all the same."""
    for name, value in list((work.get(section) or {}).items()):
        key = f"{section}.{name}" if section else name
        if name not in kinds:
            if not others:
                work.problems.append(_unknown(work, section, name, kinds))
                del work.get(section)[name]
            continue
        kind = kinds[name]
        read = value if value == AUTO and kind != "section" else _READ[kind](value)
        if read is None:
            work.problem(key, f": takes {_KIND_PHRASES[kind]}")
            work.pop(key)
            continue
        if isinstance(value, str) and not isinstance(read, str):
            work.note(f"{work.said(key)} is read as {shown(read)}, without the quotes")
        work.put(key, read)


def _unknown(work: Work, section: str, name: str, kinds: Mapping[str, str]) -> str:
    """A line for an unknown key, with the place or the key that may have been meant. Never with its value."""
    shown = shortened(json.dumps(name)[1:-1], 80)
    line = f"{f'{section}.' if section else ''}{shown} in {work.file}: DeepSpeed knows no such key"
    if section and name in TOP_KEYS:
        return f"{line} there; it belongs at the top, outside {section}"
    inside = () if section else ZERO_KEYS
    if near := close(name.lower(), [*kinds, *inside], 0.7):
        return f"{line}; did you mean {near[0] if near[0] in kinds else f'{ZERO}.{near[0]}'}?"
    if name.lower() in ALIASES:
        return f"{line}; our key for that is {ALIASES[name.lower()][0]}"
    return f"{line}; leave it out"
