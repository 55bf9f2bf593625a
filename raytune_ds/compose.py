"""From YAML files and dotted overrides to one `Config`, with every problem told at once.

pydantic-settings and tyro were looked at: their command lines want `--adapter.r 16` flags, and neither names
the file and line a value came from, refuses duplicate YAML keys or knows other trainers' key names, so nearly
all of this would stand beside them all the same; pydantic-settings alone also triples the import time.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_ds import keys
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.keys import KeyPath
from raytune_ds.problems import shortened, shown_key, told
from raytune_ds.section import SECRET_NAME
from raytune_ds.yamlfile import parse, read

COMMAND_LINE = "command line"
_MAX_DEPTH = 8  # parts of a dotted key; the tree has four (data.sources.0.path)

# Below these stand keys of other sections, or of peft.
_OF_OTHER_KEYS = (
    ("sweep", "space"),
    ("sweep", "trial"),
    ("adapter", "options"),
    ("adapter", "rank_pattern"),
    ("adapter", "alpha_pattern"),
)


def compose(files: Sequence[str | Path], overrides: Sequence[str]) -> Config:
    """Merge YAML files from left to right, then `key.sub=value` overrides, into a checked config.

    Mappings merge, everything else replaces; a value on the right wins. Override values are YAML, and a list
    takes an index (`data.sources.0.path=x`). Raises `UserError` with all problems, one a line, each with the
    place the value came from: file and line, or "command line".
    """
    given = _Given()
    steps = [partial(given.add_file, file) for file in files]
    steps += [partial(given.add_override, *pair) for pair in zip(overrides, ("", *overrides), strict=False)]
    problems = []
    for step in steps:
        try:
            step()
        except UserError as error:
            problems.append(str(error))
    return _checked(given, problems)


def dump(config: Config) -> str:
    """The resolved config as JSON, keys in the tree's order, newline at the end; holds no secrets."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def load(text: str) -> Config:
    """The config that `dump` wrote; raises `UserError` where the text is not one."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the resolved config is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError("the resolved config must be a JSON object of sections")
    return _checked(_Given(tree, {(): "resolved config"}), [])


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key to (a's, b's value) for each key that differs, in the tree's order; a list is one value."""
    flat_a, flat_b = (dict(_flat(config.model_dump(mode="json"))) for config in (a, b))
    return {key: (flat_a[key], flat_b[key]) for key in flat_a if flat_a[key] != flat_b[key]}


@dataclass
class _Given:
    """What the user gave, merged: the raw tree, and where each part of it came from."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def add_file(self, file: str | Path) -> None:
        """Merge a YAML file."""
        value, lines = read(file)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{file}: must be a mapping of sections, such as 'adapter: {{r: 16}}'")
        self._merge((), value, {path: f"{file}, line {line}" for path, line in lines.items()})

    def add_override(self, argument: str, before: str) -> None:
        """Merge one `key.sub=value`; `before` is the argument that stood before it."""
        key, equals, text = argument.partition("=")
        path = tuple(key.strip().split("."))
        if not equals:
            raise UserError(
                f"{_stray(argument, before)} ({COMMAND_LINE}): write key=value, such as adapter.r=16"
            )
        if not all(path) or len(path) > _MAX_DEPTH:
            shown = shortened(key.strip()) or "=..."
            raise UserError(f"{shown} ({COMMAND_LINE}): is no key; write section.key=value")
        value, inner = _override_value(path, text)
        self._merge(path, value, {(*path, *below): COMMAND_LINE for below in ((), *inner)})

    def where(self, path: KeyPath) -> str:
        """Where a value came from: its own place, that of something in it, or that of what it stands in."""
        for end in range(len(path), 0, -1):
            if below := [origin for key, origin in self.origins.items() if key[:end] == path[:end]]:
                return self.origins.get(path[:end], below[-1])
        return self.origins.get((), "defaults")

    def _merge(self, path: KeyPath, value: Any, places: Mapping[KeyPath, str]) -> None:
        """Set the leaves of a value; `places` tells where each part of it came from."""
        if isinstance(value, dict) and (value or keys.is_section(path)):
            for name, inner in value.items():
                self._merge((*path, name), inner, places)
        elif not (value is None and keys.is_section(path)):  # a section without keys sets nothing
            try:
                self.tree = _assigned(self.tree, path, value)
            except IndexError as error:
                raise UserError(f"{shown_key(path)} ({places[path]}): {error}") from None
            kept = {key: place for key, place in self.origins.items() if key[: len(path)] != path}
            self.origins = kept | {key: place for key, place in places.items() if key[: len(path)] == path}


def _stray(argument: str, before: str) -> str:
    """An argument that is no override, shown as far as it may be a key."""
    if SECRET_NAME.search(before):  # `--api_key sk-...` in two words
        return "an argument that is not shown"
    key = re.match(r"[\w./~-]*", argument)
    shown = key[0] if key else ""
    return shortened(shown + ("" if shown == argument else "...")) or '""'


def _override_value(path: KeyPath, text: str) -> tuple[Any, Sequence[KeyPath]]:
    """The value of an override, and the keys in it."""
    text = text.strip()
    if not (keys.field(path) or keys.list_around(path) or path[:2] in _OF_OTHER_KEYS):
        return None, []  # the key is what is wrong; the parser might quote the value, a secret perhaps
    if keys.takes_text(path) and not text.startswith(("[", "{", '"', "'")):
        # what was typed: `run.name=007`, `data.sources=*`
        return (None if text in ("", "~", "null", "Null", "NULL") else text), []
    try:
        value, lines = parse(text, f"{shown_key(path)} ({COMMAND_LINE})")
    except UserError as error:
        hint = "; quote the value if it is text" if keys.takes_text(path) else ""
        raise UserError(f"{error}{hint}") from None
    return value, list(lines)


def _assigned(old: Any, path: KeyPath, value: Any, at: KeyPath = ()) -> Any:
    """A copy of `old`, which stands at the key `at`, with a new value at `path` below that."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    here = (*at, head)
    if not keys.list_around(here):
        branch = old if isinstance(old, dict) else {}
        return {**branch, head: _assigned(branch.get(head), rest, value, here)}
    items = [] if old is None else old if isinstance(old, list) else [old]
    index = int(head)
    if index > len(items):
        raise IndexError(f"the list is shorter; its next free index is {len(items)}")
    item = items[index] if index < len(items) else None
    if rest and isinstance(item, str):  # a bare string is short for a source with that path
        item = {"path": item}
    return [*items[:index], _assigned(item, rest, value, here), *items[index + 1 :]]


def _checked(given: _Given, problems: Sequence[str]) -> Config:
    """The config of a merged tree; raises UserError with the problems of reading and those of checking."""
    lines = list(problems)
    try:
        config = Config.model_validate(given.tree)
    except ValidationError as error:
        lines += told(error, given.tree, given.where)
    if lines:
        # keys and values may hold anything: a line stays a line, and a terminal is not steered
        raise UserError("\n".join(_printable(line) for line in dict.fromkeys(lines)))
    return config


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def overridden(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """The config with other values of some dotted keys, checked again as a whole.

    Args:
        config: resolved.
        values: dotted key to value.
        where: names the place that the values came from.

    Raises:
        UserError: naming that place, for each value that does not fit.
    """
    given = _Given(config.model_dump(mode="json"), {(): "resolved config"})
    for key, value in values.items():
        path = tuple(key.split("."))
        given._merge(path, value, {path: where})
    return _checked(given, [])


def replaced(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with some keys of some sections replaced, checked again as a whole."""
    values = config.model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    return Config.model_validate(values)
