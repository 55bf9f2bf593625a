"""Text that looks like a tokenizer's control tokens stays text, so nobody writes another's turn into a conversation.

Chat templates put contents and control tokens into one string, of which a tokenizer can't tell who wrote what. So what
looks like a control token in a content is marked before the template sees it, and tokenized apart, without the marks,
by the same tokenizer without its added tokens.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from raytune_ds.data.bulk import BulkTokenizer
from raytune_ds.data.formats import Example, Message

# Noncharacters, which Unicode keeps out of all text. The second one breaks a token apart, so that nothing finds it.
_BEGIN, _WITHIN, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKED = re.compile(f"{_BEGIN}(.){_WITHIN}([^{_END}]*){_END}", re.DOTALL)
# Not control but content, where the assistant says it.
_THINKING = re.compile(r"</?think>")
_ASKED = [{"role": "user", "content": "u"}]
_PROBES = (
    _ASKED,
    [{"role": "system", "content": "s"}, *_ASKED, {"role": "assistant", "content": "a"}],
    [*_ASKED, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "t"}],
)
# What the expressions of a template can raise, on what a row holds or lacks.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_FORGED = re.compile(f"[{_BEGIN}{_WITHIN}{_END}]")


def has_literals(text: str) -> bool:
    """Whether a rendered text has marks in it."""
    return _BEGIN in text


class Literals:
    """Control tokens of one tokenizer, where they are only text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_chars: int = 0) -> None:
        """`tokenizer` carries the chat template; about `num_chars` characters are to come."""
        self._tokenizer, self._num_chars = tokenizer, num_chars

    def guarded(self, example: Example) -> Example:
        """The example with marks in all that must not become a control token.

        In what the assistant reads those are the special tokens and what else the chat template makes of added ones. In
        what it says it is what ends its turn or begins another's: tags of reasoning and tool calls are its own.
        """
        return replace(
            example,
            messages=tuple(self._guarded(message) for message in example.messages),
            tools=tuple(_map(tool, self._in_prompts) for tool in example.tools),
        )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, what is marked as text."""
        pieces = [_MARKED.split(text) for text in texts]  # text, first and rest of a mark, text ...
        unmarked = iter(self._bulk.ids([piece for of_text in pieces for piece in of_text[::3]]))
        found = []
        for of_text in pieces:
            ids = next(unmarked)
            for first, rest in zip(of_text[1::3], of_text[2::3], strict=True):
                ids += [*self._plain_ids(first + rest), *next(unmarked)]
            found.append(ids)
        return found

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of raw texts, with what the tokenizer puts around them by itself."""
        return self._bulk.ids(texts, add_special_tokens=True)

    def text(self, ids: list[int]) -> str:
        """What token ids say, control tokens included."""
        return self._bulk.text(ids)

    def token_id(self, token: str) -> int:
        """The id of an added token."""
        return self._tokenizer.get_vocab()[token]

    @cached_property
    def added(self) -> re.Pattern[str]:
        """Matches the tokenizer's added tokens."""
        return _any_of(str(token) for token in self._tokenizer.added_tokens_decoder.values())

    def _guarded(self, message: Message) -> Message:
        pattern = self._in_answers if message["role"] == "assistant" else self._in_prompts
        return {key: value if key == "role" else _map(value, pattern) for key, value in message.items()}

    @cached_property
    def _bulk(self) -> BulkTokenizer:
        return BulkTokenizer(self._tokenizer, self._probes, self._num_chars)

    def _plain_ids(self, text: str) -> list[int]:
        if not self._tokenizer.is_fast:
            return list(
                self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if set(ids).isdisjoint(self._tokenizer.added_tokens_decoder):
            return list(ids)
        # A model whose own vocabulary has the token whole.
        return [i for char in text for i in self._plain.encode(char, add_special_tokens=False).ids]

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without its added tokens."""
        nothing = {"post_processor": None, "padding": None, "truncation": None}
        return Tokenizer.from_str(json.dumps({**self._bulk.parts, **nothing, "added_tokens": []}))

    @cached_property
    def _in_prompts(self) -> re.Pattern[str]:
        """Not all that was added: it may be white space or a word of the domain, which are text."""
        template = "".join([str(self._tokenizer.chat_template), *self._probes])
        added = self._tokenizer.added_tokens_decoder.values()
        control = {
            text
            for token in added
            if (text := str(token)) in template or token.special or _THINKING.fullmatch(text)
        }
        return _any_of(control | set(self._tokenizer.all_special_tokens))

    @cached_property
    def _in_answers(self) -> re.Pattern[str]:
        around = {token for text in self._probes for token in self._in_prompts.findall(text)}
        control = around | set(self._tokenizer.all_special_tokens)
        return _any_of(token for token in control if not _THINKING.fullmatch(token))

    @cached_property
    def _probes(self) -> list[str]:
        """What the template puts around contents, as far as it takes them."""
        shown = []
        for messages in _PROBES:
            # Whoever renders rows by a template that refuses will hear why.
            with contextlib.suppress(*TEMPLATE_ERRORS):
                shown.append(
                    str(
                        self._tokenizer.apply_chat_template(
                            messages, add_generation_prompt=True, tokenize=False
                        )
                    )
                )
        return shown


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of them, but no white space; nothing if there are none."""
    visible = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, visible)) or r"(?!)")


def _map(value: Any, pattern: re.Pattern[str]) -> Any:
    """`value` with marks around what `pattern` matches in any string within it."""
    if isinstance(value, str):
        return pattern.sub(_marked, value if value.isascii() else _FORGED.sub("\ufffd", value))
    if isinstance(value, dict):
        return {_map(key, pattern): _map(member, pattern) for key, member in value.items()}
    return [_map(item, pattern) for item in value] if isinstance(value, list) else value


def _marked(found: re.Match[str]) -> str:
    return f"{_BEGIN}{found[0][0]}{_WITHIN}{found[0][1:]}{_END}"
