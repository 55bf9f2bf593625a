"""Rows that show how it is done, a prompt and the one answer to learn each, and raw text: readers by format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raytune_ds.data.conversation import Example, Turn, conversation, said, turns_of
from raytune_ds.data.values import RowError, as_list, as_string, check_unicode, kind_of, need

Row = dict[str, Any]


def _messages(row: Row) -> Example:
    return conversation(row, turns_of(need(row, "messages"), "'messages'"))


def _sharegpt(row: Row) -> Example:
    return conversation(row, turns_of(need(row, "conversations", "conversation"), "'conversations'"))


def _alpaca(row: Row) -> Example:
    asked = instruction_of(row)
    return conversation(row, [*asked, said("'output'", "assistant", need(row, "output"))])


def instruction_of(row: Row) -> list[Turn]:
    """What an alpaca row asks: its history, then its instruction and input as one message."""
    instruction = as_string(need(row, "instruction"), "'instruction'")
    parts = [instruction, as_string(row.get("input", ""), "'input'")]
    prompt = "\n".join(part for part in parts if part.strip())
    if not prompt:
        raise RowError("'instruction' and 'input' are both empty")
    return [*_history(row), said("'instruction'", "user", prompt)]


def _history(row: Row) -> list[Turn]:
    turns = []
    for number, pair in enumerate(as_list(row.get("history", []), "'history'"), 1):
        where = f"pair {number} of 'history'"
        if len(as_list(pair, where)) != 2:
            raise RowError(f"{where} has {len(pair)} items, expected a question and its answer")
        question, answer = pair
        turns.append(said(f"the question in {where}", "user", question))
        turns.append(said(f"the answer in {where}", "assistant", answer))
    return turns


def _prompt_completion(row: Row) -> Example:
    return conversation(row, prompt_of(row, "prompt") + completion_of(row))


def prompt_of(row: Row, *keys: str) -> list[Turn]:
    """What the first of `keys` asks that `row` has."""
    value = need(row, *keys)
    key = next(key for key in keys if key in row)
    prompt = side_of(value, f"'{key}'", "user")
    if not any(turn.message["content"].strip() for turn in prompt):
        raise RowError(f"'{key}' is empty")
    return prompt


def completion_of(row: Row) -> list[Turn]:
    """What answers a 'prompt'."""
    key = "completion" if "completion" in row else "response"
    return side_of(need(row, "completion", "response"), f"'{key}'", "assistant")


def side_of(value: object, what: str, role: str) -> list[Turn]:
    """One side of prompt and completion: a string, or a list of messages as TRL has it."""
    if isinstance(value, str):
        return [said(what, role, value)]
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind_of(value)}, expected a string or a list of messages")
    return turns_of(value, what, within=f" of {what}")


def _text(row: Row) -> Example:
    text = as_string(need(row, "text"), "'text'")
    if not text.strip():
        raise RowError("'text' is empty")
    check_unicode(text, "'text'")
    return Example(text=text)


READERS: dict[str, Callable[[Row], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
