"""The long part of --help: every key of the config tree."""

import json
import shutil
import textwrap
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from raytune_ds.config import Config, SourceConfig
from raytune_ds.keys import KeyPath, section_of, walk
from raytune_ds.section import Setting
from raytune_ds.sweepconfig import Dimension

_KIND_NAMES = {
    bool: "true | false",
    float: "number",
    int: "whole number",
    str: "text",
    NoneType: "null",
    SourceConfig: "path or {path, format}",
}
_MAPPINGS = {Dimension: "{key: {verb: values}}", Setting: "{key: value}"}


def help_text() -> str:
    """Every key with type, default and description, by section, wrapped at the width of the terminal."""
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    return "\n".join(_section_help(name, info, width) for name, info in Config.model_fields.items())


def _section_help(name: str, info: FieldInfo, width: int) -> str:
    model = section_of(info) or Config
    title = (model.__doc__ or "").strip().splitlines()[0]
    lines = textwrap.wrap(f"{name}: {title}", width)
    for path, inner in walk(model, (name,)):
        # data.eval.sources has the entries of data.sources: once is enough
        if not section_of(inner) and path[:4] != ("data", "eval", "sources", "0"):
            lines += _key_help(path, inner, width)
    return "\n".join(lines) + "\n"


def _key_help(path: KeyPath, info: FieldInfo, width: int) -> list[str]:
    key = ".".join("N" if part == "0" else part for part in path)
    default = "required" if info.is_required() else f"default {json.dumps(info.default)}"
    head = f"  {key}: {_kind(info.annotation, info.metadata)}; {default}"
    indent = " " * 6
    return textwrap.wrap(head, width, subsequent_indent=indent, break_on_hyphens=False) + textwrap.wrap(
        indent + (info.description or ""), width, subsequent_indent=indent, break_on_hyphens=False
    )


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: choices, bounds, lists."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return " | ".join(_kind(part, metadata) for part in arguments)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is tuple and arguments[0] in _MAPPINGS:
        return _MAPPINGS[arguments[0]]
    if origin is tuple:
        return f"list of ({_kind(arguments[0])})"
    return _KIND_NAMES[annotation] + (_bounds(metadata) if annotation in (int, float) else "")


def _bounds(metadata: Sequence[Any]) -> str:
    """Bounds as ' >= 1 < 5'; Field() keeps them in its own metadata when it stands inside Annotated."""
    marks = [mark for data in metadata for mark in (data.metadata if isinstance(data, FieldInfo) else [data])]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(
        f" {sign} {getattr(mark, name)}"
        for mark in marks
        for name, sign in signs.items()
        if hasattr(mark, name)
    )
