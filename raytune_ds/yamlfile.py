"""YAML by the rules of version 1.2, with the line each value stands in, and no key given twice.

`2e-4` is a number, `no` and `2024-01-01` are text, `010` is ten. Tags and merge keys (`<<`) mean nothing:
PyYAML gives only its node graph, because its own values follow YAML 1.1 and it keeps the last of two keys.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from raytune_ds.errors import UserError

Lines = dict[tuple[str, ...], int]

_CONSTANTS = {
    form: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for form in (word, word.title(), word.upper())
} | {"": None, "~": None}
_WHOLE = re.compile(r"[-+]?[0-9](_?[0-9]){0,99}")  # int() refuses thousands of digits
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def read(file: str | Path) -> tuple[Any, Lines]:
    """What `parse` finds in a file. Raises `UserError` with the file's name."""
    try:
        return parse(Path(file).read_text(encoding="utf-8-sig"), str(file))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such config file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def parse(text: str, where: str) -> tuple[Any, Lines]:
    """The value of one document (dicts with text keys, lists, scalars) and the line of each value in it.

    Raises `UserError` that begins with `where`.
    """
    lines: Lines = {}
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return (None if node is None else _value(node, (), lines)), lines
    except yaml.YAMLError as error:
        raise UserError(where + _told(error)) from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply, or refers to itself") from None


def _value(node: yaml.Node, path: tuple[str, ...], lines: Lines) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return {key.value: _entry(key, value, path, lines) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, str(index)), lines) for index, item in enumerate(node.value)]
    # a quoted scalar has a style, and is text
    return node.value if getattr(node, "style", None) else _scalar(node.value)


def _entry(key: yaml.Node, value: yaml.Node, path: tuple[str, ...], lines: Lines) -> Any:
    if not isinstance(key, yaml.ScalarNode):
        problem = "a key must be plain text, not a list or mapping"
        raise ConstructorError(None, None, problem, key.start_mark)
    inner = (*path, key.value)
    if inner in lines:
        problem = f"{key.value} is set twice, first in line {lines[inner]}; keep one"
        raise ConstructorError(None, None, problem, key.start_mark)
    lines[inner] = key.start_mark.line + 1
    return _value(value, inner, lines)


def _scalar(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _told(error: yaml.YAMLError) -> str:
    """', line 3, column 1: what is wrong', the place as far as it is known."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    return f"{place}: {what}" if isinstance(error, ConstructorError) else f"{place}: not valid YAML: {what}"
