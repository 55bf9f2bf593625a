"""The reasoning of an answer: where it stands in a message, and how it is written behind a prompt.

Servers take for reasoning what stands before `</think>`, behind a `<think>` that the prompt may have opened already. So
an answer that begins within an open `<think>` has to close it, with or without reasoning, or all of it is lost to who
asked; and behind a prompt that has closed it, none can follow.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from raytune_ds.data.formats import Message

Thinking = Literal["keep", "drop", "auto"]
OPEN, CLOSE = "<think>", "</think>"
_OPENER = re.compile(rf"{OPEN}\s*\Z")
_EMPTY = re.compile(rf"\s*(?:{OPEN}\s*)?{CLOSE}")
_TAGS = re.compile(rf"\s*(?:{OPEN}\s*(?:{CLOSE})?|{CLOSE})")

# What became of the reasoning of answers, in words that make sense behind 'answers: N '.
KEPT = "with reasoning"
NONE = "without reasoning"
ENDED = "without reasoning, closed at once"
DROPPED = "trained on without their reasoning"
BARRED = "trained on without their reasoning, as the prompt has closed it"


class Parted(NamedTuple):
    """An assistant's message in two."""

    reasoning: str
    """Without white space around it; empty if there is none."""
    bare: Message
    """The message without its reasoning, and without tags around nothing."""


def part(message: Message) -> Parted:
    """Takes the reasoning out of an assistant's message: what its content begins with, else `reasoning_content`."""
    content, field = message.get("content") or "", (message.get("reasoning_content") or "").strip()
    inline = _inline(content) if CLOSE in content else None
    if inline is None and not field:
        return Parted("", message)
    reasoning, answer = inline or ("", content)
    bare = {key: value for key, value in message.items() if key != "reasoning_content"}
    return Parted(reasoning.strip() or field, {**bare, "content": answer.lstrip()})


def _inline(content: str) -> tuple[str, str] | None:
    """Reasoning and answer, if the content begins with reasoning or with tags around nothing."""
    before, _, answer = content.partition(CLOSE)
    if before.lstrip().startswith(OPEN):
        return before.lstrip().removeprefix(OPEN), answer
    # As a model writes it behind a prompt that has opened it. Within a line it is more likely talked about.
    alone = before.endswith("\n") and answer[:1] in ("", "\n")
    return (before, answer) if alone and before.strip() and OPEN not in before else None


def opener(prompt: str) -> str:
    """The `<think>` that a prompt ends with, white space behind it included; empty if it opens none."""
    found = _OPENER.search(prompt)
    return found[0] if found else ""


def has_closed(prompt: str) -> bool:
    """Whether a prompt ends with `</think>`, so that no reasoning can follow."""
    return prompt.rstrip().endswith(CLOSE)


def written(reasoning: str, opened: str) -> str:
    """The reasoning up to where the answer begins, in a prompt's own white space if that has opened it."""
    if not opened:
        return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n"
    newline = "\n" if "\n" in opened else ""
    return f"{reasoning}{newline if reasoning else ''}{CLOSE}{newline * 2}"


def without_tags(answer: str) -> str:
    """A rendered answer without the tag, or the tags around nothing, that a template may have put before it."""
    found = _TAGS.match(answer)
    return answer[found.end() :] if found else answer


def begins_empty(answer: str) -> bool:
    """Whether a rendered answer begins with the end of reasoning that there is none of."""
    return _EMPTY.match(answer) is not None
