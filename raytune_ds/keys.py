"""The config tree as a flat table of dotted keys, made once from the pydantic classes."""

import re
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raytune_ds.config import Config, SourceConfig
from raytune_ds.section import types_in

KeyPath = tuple[str, ...]

INDEX = re.compile(r"[0-9]{1,4}")  # of an entry of a list, in a dotted key


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is itself a section, or None."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def walk(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every field below a section, sections included; entry 0 of a list of sources stands for all."""
    for name, info in model.model_fields.items():
        path = (*prefix, name)
        yield path, info
        if inner := section_of(info):
            yield from walk(inner, path)
        elif SourceConfig in types_in(info.annotation):
            yield from walk(SourceConfig, (*path, "0"))


FIELDS: dict[KeyPath, FieldInfo] = dict(walk(Config))
# dotted keys that take a value; an entry of a list of sources is written with index 0
KEYS: tuple[str, ...] = tuple(".".join(path) for path, info in FIELDS.items() if not section_of(info))


def field(path: KeyPath) -> FieldInfo | None:
    """The field a key names, or None; any index will do."""
    return FIELDS.get(tuple("0" if INDEX.fullmatch(part) else part for part in path))


def is_section(path: KeyPath) -> bool:
    """Whether a key names a section; the empty key names the whole tree."""
    info = field(path)
    return not path or (info is not None and section_of(info) is not None)


def list_around(path: KeyPath) -> FieldInfo | None:
    """The field whose entry a key such as `data.sources.0` names, or None."""
    info = field(path[:-1])
    is_entry = (
        bool(path) and INDEX.fullmatch(path[-1]) and info is not None and "tuple" in str(info.annotation)
    )
    return info if is_entry else None


def takes_text(path: KeyPath) -> bool:
    """Whether any text will do for a field, or for an entry of the list it is."""
    info = field(path) or list_around(path)
    return info is not None and not {str, SourceConfig}.isdisjoint(types_in(info.annotation))
