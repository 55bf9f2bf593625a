"""What every section of the config tree is made of: strict and frozen, and checks that several of them share."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, get_args
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# words that make a key a secret's name; used here for URIs and by compose for unknown keys
SECRET_NAME = re.compile(
    r"(api|access|private)[_-]?key|secret|passw(or)?d|passphrase|credential|(^|[_-])(auth|token)$",
    re.IGNORECASE,
)

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


def types_in(annotation: Any) -> Iterator[Any]:
    """Every plain type and literal value that an annotation is made of, however deep."""
    if not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def about(key: str, message: str) -> PydanticCustomError:
    """An error of a whole section that is really about its field `key`; compose reports it under that key."""
    return PydanticCustomError("about", "{message}", {"key": key, "message": message})


def holds_credentials(text: str) -> bool:
    """Whether a URI carries a password or a key: in `user:password@host` or in its query."""
    try:
        uri = urlsplit(text)
    except ValueError:  # brackets that are no IPv6 address: a path or a pattern, not a URI
        return False
    user_info, at, _ = uri.netloc.rpartition("@")
    return (bool(at) and ":" in user_info) or any(
        SECRET_NAME.search(name) for name, _ in parse_qsl(uri.query)
    )


def without_credentials(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it holds credentials.
    """
    if holds_credentials(text):
        raise ValueError(
            "holds credentials, which would be written to config.json; take them out and set them in the "
            "environment of the nodes instead"
        )
    return text


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes afterwards, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as 1: `micro_batch: true` is a mistake, not a batch of one
        if isinstance(value, bool) and info.field_name:
            types = set(types_in(cls.model_fields[info.field_name].annotation))
            if bool not in types and types & {int, float}:
                raise ValueError("takes a number, not true or false")
        return value


class Setting(Section):
    """A key, dotted, and its value."""

    key: str
    value: Any


def as_settings(given: Any, example: str) -> Any:
    """A mapping, however deep, as settings with dotted keys; what is none is left to pydantic.

    Raises:
        ValueError: it is no mapping, or a key is in it nested and dotted, which YAML does not see; `example` shows one.
    """
    if isinstance(given, tuple) and all(isinstance(item, Setting) for item in given):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"takes keys and their values: {example}")
    settings = list(_settings(given))
    counts = Counter(setting["key"] for setting in settings)
    if twice := [f"{key}: is named twice" for key, count in counts.items() if count > 1]:
        raise ValueError("; ".join(twice))
    return settings


def as_mapping(settings: Iterable[Setting]) -> dict[str, Any]:
    """Dotted key to value."""
    return {setting.key: setting.value for setting in settings}


def _settings(given: Mapping[str, Any], prefix: str = "") -> Iterator[dict[str, Any]]:
    for name, value in given.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield {"key": f"{prefix}{name}", "value": frozen(value)}


def frozen(value: Any) -> Any:
    """Lists as tuples, however deep: a config is hashable."""
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value
