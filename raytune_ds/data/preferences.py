"""Rows that judge answers: pairs of a chosen and a rejected one, and answers that are desirable or not (KTO).

What is judged is all that the assistant says after the prompt. What it said before that is context.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytune_ds.data.conversation import Example, Turn, conversation, said, turn_of, turns_of
from raytune_ds.data.demonstrations import completion_of, instruction_of, prompt_of, side_of
from raytune_ds.data.values import RowError, kind_of, need

Row = dict[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question")
LABELS = ("kto_tag", "label")


# ---- pairs ----------------------------------------------------------------------------------------


def preference(row: Row) -> Example:
    """The pair of a row; the prompt stands in columns of its own, or is how both conversations begin."""
    chosen, rejected = (_answer_of_pair(row, key) for key in ("chosen", "rejected"))
    whole = [key for key, side in (("chosen", chosen), ("rejected", rejected)) if _is_whole(side)]
    if len(whole) == 2:
        prompt, chosen, rejected = _common_prompt(row, chosen, rejected)
    elif whole:
        other = "rejected" if whole == ["chosen"] else "chosen"
        raise RowError(f"'{whole[0]}' is a whole conversation and '{other}' an answer: the two must be alike")
    else:
        prompt = _prompt(row)
    pair = _completed(row, prompt, chosen, "'chosen'"), _completed(row, prompt, rejected, "'rejected'")
    if pair[0] == pair[1]:
        raise RowError("'chosen' and 'rejected' are the same: there is nothing to prefer")
    return replace(pair[0], rejected=pair[1])


def _answer_of_pair(row: Row, key: str) -> list[Turn]:
    value = need(row, key)
    if isinstance(value, dict):
        return [turn_of(value, f"'{key}'")]
    if value == []:
        raise RowError(f"'{key}' is empty")
    if not isinstance(value, str | list):
        raise RowError(f"'{key}' is {kind_of(value)}, expected a string, a message or a list of messages")
    return side_of(value, f"'{key}'", "assistant")


def _is_whole(side: list[Turn]) -> bool:
    return side[0].message["role"] in ("system", "user")


def _common_prompt(
    row: Row, chosen: list[Turn], rejected: list[Turn]
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Prompt and answers of two conversations: they part where the longest beginning that they share ends."""
    last = min(_last_answer(chosen, "'chosen'"), _last_answer(rejected, "'rejected'"))
    pairs = zip(chosen[:last], rejected[:last], strict=True)
    shared = next((i for i, (one, other) in enumerate(pairs) if one.message != other.message), last)
    if not any(turn.message["role"] == "user" for turn in chosen[:shared]):
        raise RowError("the prompts of 'chosen' and 'rejected' differ: the two begin with different messages")
    for side in (chosen, rejected):
        if (role := side[shared].message["role"]) != "assistant":
            raise RowError(
                f"the prompts of 'chosen' and 'rejected' differ: the two part at {side[shared].where}, which is"
                f" of the {role} and not of the assistant"
            )
    _require_same_prompt(row, chosen)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _last_answer(side: list[Turn], what: str) -> int:
    answers = [i for i, turn in enumerate(side) if turn.message["role"] == "assistant"]
    if not answers:
        raise RowError(f"{what} has no assistant message")
    return answers[-1]


def _require_same_prompt(row: Row, chosen: list[Turn]) -> None:
    """Beside whole conversations a prompt is often given once more: then it must be one of their questions."""
    if not any(key in row for key in QUESTIONS):
        return
    asked = prompt_of(row, *QUESTIONS)[-1].message["content"].strip()
    if asked not in (turn.message["content"].strip() for turn in chosen):
        raise RowError(
            "its prompt is not in 'chosen', which is a whole conversation with a prompt of its own"
        )


def _prompt(row: Row) -> list[Turn]:
    if any(key in row for key in QUESTIONS):
        return prompt_of(row, *QUESTIONS)
    if any(key in row for key in CONVERSATIONS):
        return _turns_of_row(row)
    if "instruction" in row:
        return instruction_of(row)
    raise RowError(
        "it has no prompt: expected 'prompt', 'messages', 'conversations' or 'instruction' beside 'chosen' and"
        " 'rejected', or whole conversations, lists of messages, in these two"
    )


# ---- labels ---------------------------------------------------------------------------------------


def kto(row: Row) -> Example:
    """The labelled answer of a row: a completion, an output, or what follows a conversation's last question."""
    desirable = _label(row)
    return replace(_completed(row, *_judged(row)), desirable=desirable)


def _judged(row: Row) -> tuple[list[Turn], list[Turn], str]:
    """The prompt, the answer and what to call it."""
    if any(key in row for key in CONVERSATIONS):
        return *_split_at_last_question(_turns_of_row(row)), "the conversation"
    if "prompt" in row:
        return prompt_of(row, "prompt"), completion_of(row), "the completion"
    need(row, "messages", "conversations", "prompt", "instruction")
    return instruction_of(row), [said("'output'", "assistant", need(row, "output"))], "'output'"


def is_labelled(row: Row) -> bool:
    """Whether a row says of its answer that it is desirable or not; a number may be a label of anything."""
    return any(isinstance(row.get(key), bool) for key in LABELS)


def _label(row: Row) -> bool:
    value = need(row, *LABELS)
    key = next(key for key in LABELS if key in row)
    if not isinstance(value, int) or value not in (0, 1):
        raise RowError(f"'{key}' is {kind_of(value)}, expected true (desirable) or false, or 1 or 0")
    return bool(value)


def _split_at_last_question(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    questions = [i for i, turn in enumerate(turns) if turn.message["role"] == "user"]
    behind = questions[-1] + 1 if questions else 0
    return turns[:behind], turns[behind:]


# ---- both -----------------------------------------------------------------------------------------


def _turns_of_row(row: Row) -> list[Turn]:
    key = next(key for key in CONVERSATIONS if key in row)
    return turns_of(row[key], f"'{key}'")


def _completed(row: Row, prompt: list[Turn], answer: list[Turn], what: str) -> Example:
    """The prompt and its answer, the answer trained on alone; `what` is what to call it."""
    if prompt and prompt[-1].message["role"] == "assistant":
        raise RowError(
            f"{prompt[-1].where} is the last of the prompt; behind an assistant message nothing is asked that"
            " an answer could be judged by"
        )
    if answer and (first := answer[0]).message["role"] != "assistant":
        raise RowError(f"{first.where} begins the answer, expected an assistant message")
    if not answer or answer[-1].message["role"] != "assistant":
        raise RowError(f"{what} does not end in an assistant message: there is no answer to judge")
    return conversation(row, [turn._replace(trained=False) for turn in prompt] + answer)
