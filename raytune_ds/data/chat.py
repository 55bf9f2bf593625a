"""A tokenizer's chat template as servers use it: with its switch of thinking, and tool calls in the form it takes.

What a template can do is found by trying it on small conversations, never by the model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune_ds.data.formats import Message, RowError
from raytune_ds.data.literal import TEMPLATE_ERRORS
from raytune_ds.data.thinking import Thinking

_SWITCHES = ("thinking", "enable_thinking")
"""The names that published templates have for it."""
_ASKED: Message = {"role": "user", "content": "u"}
_ARGUMENTS = {"argument": "value"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "called", "arguments": _ARGUMENTS}}],
}


def as_trained(tokenizer: PreTrainedTokenizerBase, thinking: Thinking) -> str | None:
    """The chat template with its switch of thinking set to what it was in training, for whoever does not set it.

    `auto` trained it in both modes, and a template without a switch has none to set: they stay as they are.
    """
    template = ChatTemplate(tokenizer)
    if thinking == "auto" or tokenizer.chat_template is None or not template.has_switch:
        return tokenizer.chat_template
    mode = "true" if thinking == "keep" else "false"
    defaults = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {mode} %}}{{%- endif %}}" for name in _SWITCHES
    )
    return "".join(defaults) + str(tokenizer.chat_template)


class ChatTemplate:
    """Renders conversations by one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` carries the template."""
        self._tokenizer = tokenizer

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        generate: bool,
        thinking: bool | None = None,
    ) -> str:
        """The conversation as text; `thinking` sets the switch if the template has one, None leaves it alone.

        Raises:
            RowError: the template refuses it (roles that do not alternate, a role it does not know ...).
        """
        return self._applied([self._formed(messages)], tools, generate, thinking)[0]

    def prompts(
        self,
        messages: Sequence[Message],
        positions: Sequence[int],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None = None,
    ) -> list[str]:
        """What is seen before each of some messages is said, rendered together; `thinking` as above.

        Raises:
            RowError: the template refuses one of them.
        """
        formed = self._formed(messages)
        return self._applied([formed[:position] for position in positions], tools, True, thinking)

    def said(self, prompt: str, finished: str) -> tuple[str, str]:
        """What a finished conversation has behind `prompt`, nothing if it does not begin so, and its end token."""
        behind = finished[len(prompt) :] if finished.startswith(prompt) else ""
        rendered, end = self._up_to_end(behind or finished)
        return rendered if behind else "", end

    @cached_property
    def has_switch(self) -> bool:
        """Whether a prompt with thinking differs from one without."""
        try:
            on, off = (self._applied([[_ASKED]], (), True, thinking) for thinking in (True, False))
        except RowError:
            return False
        return on != off

    def _up_to_end(self, rendered: str) -> tuple[str, str]:
        """A rendered answer up to its end token, and that token; the tokenizer's EOS where the template puts none.

        Behind the end token templates put separators, which belong to the next turn's context.
        """
        ends = list(self._special_token.finditer(rendered))
        if ends and not rendered[ends[-1].end() :].strip():
            return rendered[: ends[-1].end()], ends[-1].group()
        end = self._tokenizer.eos_token or ""
        return rendered + end, end

    @cached_property
    def _wants_json(self) -> bool:
        """Whether it writes the arguments of a call as it gets them, so that they have to come as JSON already."""
        return not self._shows(_CALL) and self._shows(_with_json(_CALL))

    def _shows(self, call: Message) -> bool:
        try:
            (text,) = self._applied([[_ASKED, call]], (), False, None)
        except RowError:
            return False
        return all(name in text for name in ("called", *_ARGUMENTS)) and str(_ARGUMENTS) not in text

    def _formed(self, messages: Sequence[Message]) -> list[Message]:
        return [_with_json(m) if m.get("tool_calls") and self._wants_json else m for m in messages]

    def _applied(
        self,
        conversations: list[list[Message]],
        tools: Sequence[dict[str, Any]],
        generate: bool,
        thinking: bool | None,
    ) -> list[str]:
        switch: dict[str, Any] = {} if thinking is None else dict.fromkeys(_SWITCHES, thinking)
        shared = {
            "tools": list(tools) or None,
            "add_generation_prompt": generate,
            "tokenize": False,
            **switch,
        }
        try:
            if len(conversations) == 1:  # a tokenizer with code of its own may take no more
                return [str(self._tokenizer.apply_chat_template(conversations[0], **shared))]
            return [*map(str, self._tokenizer.apply_chat_template(conversations, **shared))]
        except TEMPLATE_ERRORS as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        tokens = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        tokens.update(self._tokenizer.all_special_tokens)
        return re.compile(
            "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"
        )


def _with_json(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
