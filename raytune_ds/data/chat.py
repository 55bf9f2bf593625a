"""A tokenizer's chat template as servers use it: with its switch of thinking, and tool calls in the form it takes.

What a template can do is found by trying it on small conversations, never by the model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from raytune_ds.data.formats import Message, RowError

_ASKED: Message = {"role": "user", "content": "u"}
_ARGUMENTS = {"argument": "value"}
_CALL = {"type": "function", "function": {"name": "called", "arguments": _ARGUMENTS}}


class _CallForm(NamedTuple):
    """How a template takes a tool call. Some write the arguments as they get them, or look for a content of null."""

    json_arguments: bool
    null_content: bool

    def of(self, message: Message) -> Message:
        """The message in this form."""
        content = message.get("content") or (None if self.null_content else "")
        calls = message["tool_calls"]
        if self.json_arguments:
            calls = [{**call, "function": _with_json(call["function"])} for call in calls]
        return {**message, "content": content, "tool_calls": calls}


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
        formed = [self._call_form.of(m) if m.get("tool_calls") else m for m in messages]
        try:
            return self._applied(formed, tools, generate, thinking)
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def up_to_end(self, rendered: str) -> tuple[str, str]:
        """A rendered answer up to its end token, and that token; the tokenizer's EOS where the template puts none.

        Behind the end token templates put separators, which belong to the next turn's context.
        """
        ends = list(self._special_token.finditer(rendered))
        if ends and not rendered[ends[-1].end() :].strip():
            return rendered[: ends[-1].end()], ends[-1].group()
        end = self._tokenizer.eos_token or ""
        return rendered + end, end

    @cached_property
    def has_switch(self) -> bool:
        """Whether a prompt with thinking differs from one without."""
        try:
            on, off = (self._applied([_ASKED], (), True, thinking) for thinking in (True, False))
        except (TemplateError, TypeError, ValueError):
            return False
        return on != off

    @cached_property
    def _call_form(self) -> _CallForm:
        forms = [_CallForm(text, null) for text in (False, True) for null in (False, True)]
        return next((form for form in forms if self._shows_a_call(form)), forms[0])

    def _shows_a_call(self, form: _CallForm) -> bool:
        call = form.of({"role": "assistant", "content": "", "tool_calls": [_CALL]})
        try:
            text = self._applied([_ASKED, call], (), False, None)
        except (TemplateError, TypeError, ValueError):
            return False
        return all(part in text for part in ("called", *_ARGUMENTS)) and str(_ARGUMENTS) not in text

    def _applied(
        self, messages: list[Message], tools: Sequence[dict[str, Any]], generate: bool, thinking: bool | None
    ) -> str:
        # The two names that published templates have for it.
        switch: dict[str, Any] = (
            {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        )
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, add_generation_prompt=generate, tokenize=False, **switch
            )
        )

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        tokens = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        tokens.update(self._tokenizer.all_special_tokens)
        return re.compile(
            "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"
        )


def _with_json(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
