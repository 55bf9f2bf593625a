"""Loads tokenizers, and says when two of them would make the same tokens of the same rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError


@dataclass(frozen=True)
class Traits:
    """What the preparation wants to know of a tokenizer.

    Attributes:
        fingerprint: a hash over everything that decides which tokens a row becomes.
        chats: whether it has a chat template.
    """

    fingerprint: str
    chats: bool


@dataclass(frozen=True)
class TokenizerSpec:
    """What it takes to load one tokenizer in any process.

    Attributes:
        name: a directory or a hub name.
        chat_template: jinja text in place of the tokenizer's own; None keeps that.
        trust_remote_code: whether the model's own Python may run.
        added: tokens in addition to its own.
        added_special: control tokens in addition.
        traits: where they are known; loading a tokenizer takes seconds of imports.
    """

    name: str
    chat_template: str | None = None
    trust_remote_code: bool = False
    added: tuple[str, ...] = ()
    added_special: tuple[str, ...] = ()
    traits: Traits | None = field(default=None, compare=False)

    @staticmethod
    def of(model: ModelConfig, chat_template_file: str | None = None) -> TokenizerSpec:
        """A model's tokenizer; reads the template file.

        Raises:
            UserError: it can't be read.
        """
        template = None
        if chat_template_file is not None:
            try:
                template = Path(chat_template_file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"data.chat_template = {chat_template_file}: can't be read: {error}"
                ) from error
        return TokenizerSpec(
            model.name, template, model.trust_remote_code, model.add_tokens, model.add_special_tokens
        )


@lru_cache(maxsize=4)
def load_tokenizer(spec: TokenizerSpec):  # type: ignore[no-untyped-def]  # transformers' type, imported late
    """The tokenizer, its chat template replaced if the spec says so.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.name, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.name = {spec.name}: no tokenizer can be loaded from it "
            f"({str(error).strip().splitlines()[0]}).\n"
            "A model directory needs tokenizer.json and tokenizer_config.json; copy them from the model it stems from."
        ) from error
    tokenizer.add_tokens(list(spec.added))
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(spec.added_special)}, replace_extra_special_tokens=False
    )
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    return tokenizer


def traits_of(spec: TokenizerSpec) -> Traits:
    """Those that it is known to have, or else what loading it shows.

    Raises:
        UserError: there is no tokenizer.
    """
    if spec.traits is not None:
        return spec.traits
    tokenizer = load_tokenizer(spec)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    state = [vocabulary, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    fingerprint = hashlib.blake2b("\0".join(state).encode(), digest_size=16).hexdigest()
    return Traits(fingerprint, chats=bool(tokenizer.chat_template))
