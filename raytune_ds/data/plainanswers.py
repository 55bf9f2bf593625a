"""How a chat template writes an answer that is only text: found once for each shape of a conversation.

Most answers are, and to render the finished conversation of each only shows again what a template puts before and
behind them. That may depend on who has spoken before, as with Qwen3, but hardly on the words. Where these change how
the prompt ends, as a `/no_think` does with some, or begin with a tag, as what Qwen3 takes for the output of a tool and
not for a question, the answer is rendered after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from raytune_ds.data.chat import ChatTemplate
from raytune_ds.data.formats import Message, RowError
from raytune_ds.data.thinking import CLOSE, OPEN

_SHAPES = 1024
_WORD, _LAST = "x", "the last word"
_ANSWERS = ("The answer, 42", "1. *More*\n\nthan one line: é 好")
_CALL = {"type": "function", "function": {"name": _WORD, "arguments": {_WORD: _WORD}}}
_TOOL = {
    "type": "function",
    "function": {"name": _WORD, "description": _WORD, "parameters": {"type": "object", "properties": {}}},
}


class _Spoken(NamedTuple):
    """A message without its words."""

    role: str
    says: bool
    num_calls: int
    others: tuple[str, ...]

    @staticmethod
    def of(message: Message) -> _Spoken:
        calls = message.get("tool_calls") or ()
        others = tuple(key for key in message if key not in ("role", "content", "tool_calls"))
        return _Spoken(message["role"], bool(message["content"].strip()), len(calls), others)

    def with_words(self) -> Message:
        message: Message = {"role": self.role, "content": _WORD * self.says}
        if self.num_calls:
            message["tool_calls"] = [_CALL] * self.num_calls
        return message | dict.fromkeys(self.others, _WORD)


class _Around(NamedTuple):
    """What is before and behind an answer, and what the prompt ends with."""

    prompt_end: str
    ahead: str
    behind: str


class PlainAnswers:
    """What one chat template puts around them."""

    def __init__(self, template: ChatTemplate) -> None:
        """`template` renders."""
        self._template = template
        self._around = lru_cache(maxsize=_SHAPES)(self._found_around)

    def written(
        self,
        prompt: str,
        before: Sequence[Message],
        answer: Message,
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
    ) -> str | None:
        """An answer with its end token, as it follows `prompt`, which was rendered from the messages before it.

        None where it is more than text, or the template does something else with it than to put something around it.
        """
        if not _is_text(answer) or any(message["content"].lstrip().startswith("<") for message in before):
            return None
        around = self._around(tuple(map(_Spoken.of, before)), bool(tools), thinking)
        if around is None or not prompt.endswith(around.prompt_end):
            return None
        return around.ahead + answer["content"] + around.behind

    def _found_around(
        self, before: tuple[_Spoken, ...], has_tools: bool, thinking: bool | None
    ) -> _Around | None:
        messages, tools = [spoken.with_words() for spoken in before], [_TOOL] * has_tools
        messages[-1]["content"] = _LAST * before[-1].says
        found = set()
        try:
            prompt = self._template.render(messages, tools, generate=True, thinking=thinking)
            for content in _ANSWERS:
                finished = [*messages, {"role": "assistant", "content": content}]
                whole = self._template.render(finished, tools, generate=False, thinking=thinking)
                rendered, _ = self._template.said(prompt, whole)
                ahead, *others = rendered.split(content)
                if len(others) != 1:
                    return None
                found.add(_Around(prompt.rpartition(_LAST)[2], ahead, others[0]))
        except RowError:  # of a conversation that is none; with the real one it may be fine
            return None
        return found.pop() if len(found) == 1 else None


def _is_text(answer: Message) -> bool:
    """Whether it is nothing else, without white space around it and without tags of reasoning."""
    content = answer["content"]
    tagged = OPEN in content or CLOSE in content
    return answer.keys() == {"role", "content"} and not tagged and content == content.strip() != ""
