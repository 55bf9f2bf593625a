"""Rows that judge answers, pairs and labels: what each style gives, and what each mistake is told."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ds.data.formats import Example, RowError, detect, to_example

Message = dict[str, Any]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def gpt(value: str) -> Message:
    return {"from": "gpt", "value": value}


SYSTEM = {"role": "system", "content": "s"}
ASKED = (user("q"),)
BEFORE = (user("p"), answer("o"), user("q"))
LATER_SHARED = (user("p"), answer("o"))
SPEC = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "f", "arguments": {}}


def pair(prompt: tuple[Message, ...], silent: frozenset[int] = frozenset()) -> Example:
    """The prompt, answered by 'good' and by 'bad'."""
    rejected = Example((*prompt, answer("bad")), silent=silent)
    return Example((*prompt, answer("good")), silent=silent, rejected=rejected)


def refusal(row: Any, format: str) -> str:
    with pytest.raises(RowError) as caught:
        to_example(row, format)
    return str(caught.value)


STRINGS = {"chosen": "good", "rejected": "bad"}
MESSAGES = {"chosen": answer("good"), "rejected": answer("bad")}
LISTS = {"chosen": [answer("good")], "rejected": [answer("bad")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "p"},
                    gpt("o"),
                    {"from": "human", "value": "q"},
                ],
                "chosen": gpt("good"),
                "rejected": gpt("bad"),
            },
            pair(BEFORE, frozenset({1})),
            id="sharegpt",
        ),
        pytest.param({"messages": BEFORE, **MESSAGES}, pair(BEFORE, frozenset({1})), id="messages"),
        pytest.param({"messages": ASKED, **LISTS}, pair(ASKED), id="messages, lists"),
        pytest.param({"messages": ASKED, **STRINGS}, pair(ASKED), id="messages, strings"),
        pytest.param({"prompt": "q", **STRINGS}, pair(ASKED), id="explicit prompt"),
        pytest.param({"prompt": BEFORE, **LISTS}, pair(BEFORE, frozenset({1})), id="explicit conversation"),
        pytest.param(
            {"system": "s", "question": "q", **STRINGS}, pair((SYSTEM, *ASKED)), id="question and system"
        ),
        pytest.param(
            {"chosen": [*BEFORE, answer("good")], "rejected": [*BEFORE, answer("bad")]},
            pair(BEFORE, frozenset({1})),
            id="implicit prompt",
        ),
        pytest.param(
            {
                "prompt": "q",
                "messages": [*ASKED, answer("good")],
                "chosen": [*ASKED, answer("good")],
                "rejected": [*ASKED, answer("bad")],
                "score_chosen": 8.0,
            },
            pair(ASKED),
            id="implicit prompt, given twice",
        ),
        pytest.param({"instruction": "q", "input": "", **STRINGS}, pair(ASKED), id="alpaca"),
        pytest.param(
            {"instruction": "q", "system": "s", "history": [["p", "o"]], "output": None, **STRINGS},
            pair((SYSTEM, *BEFORE), frozenset({2})),
            id="alpaca with history",
        ),
    ],
)
def test_every_style_of_a_pair(row: dict[str, Any], expected: Example) -> None:
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
    assert detect([row]) == "preference"
    assert to_example(row, "preference") == expected


def test_tools_and_calls_of_a_pair() -> None:
    row = {
        "conversations": [{"from": "human", "value": "q"}],
        "tools": [SPEC],
        "chosen": [
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "r"},
            gpt("good"),
        ],
        "rejected": gpt("bad"),
    }
    example = to_example(row, "preference")
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.silent == frozenset()  # a call belongs to the answer
    assert example.rejected is not None
    assert example.tools == example.rejected.tools == ({"type": "function", "function": SPEC},)


def test_conversations_part_where_the_last_common_message_is() -> None:
    chosen = [user("p"), answer("o"), user("q"), answer("good")]
    rejected = [user("p"), answer("o"), user("q"), answer("bad"), user("r"), answer("worse")]
    example = to_example({"chosen": chosen, "rejected": rejected}, "preference")
    assert example.silent == {1}
    assert example.rejected is not None
    assert (example.rejected.messages, example.rejected.silent) == (tuple(rejected), {1})


def test_a_conversation_that_the_other_goes_on_with_keeps_an_answer() -> None:
    longer = [*BEFORE, answer("good")]
    example = to_example({"chosen": longer, "rejected": longer[:2]}, "preference")
    assert example.rejected is not None
    assert (example.silent, example.rejected.silent) == (frozenset(), frozenset())
    assert example.rejected.messages == tuple(longer[:2])


def test_a_message_of_an_answer_may_be_context() -> None:
    chosen = [answer("think", weight=0), user("go on"), answer("good")]
    example = to_example({"prompt": "q", "chosen": chosen, "rejected": "bad"}, "preference")
    assert example.silent == {1}


def labelled(prompt: tuple[Message, ...], desirable: bool, silent: frozenset[int] = frozenset()) -> Example:
    return Example((*prompt, answer("a")), silent=silent, desirable=desirable)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*ASKED, answer("a")], "label": True}, labelled(ASKED, True)),
        ({"messages": [*BEFORE, answer("a")], "kto_tag": False}, labelled(BEFORE, False, frozenset({1}))),
        (
            {"conversations": [{"from": "human", "value": "q"}, gpt("a")], "label": False, "kto_tag": None},
            labelled(ASKED, False),
        ),
        ({"prompt": "q", "completion": "a", "label": True}, labelled(ASKED, True)),
        (
            {"prompt": list(BEFORE), "completion": [answer("a")], "label": True},
            labelled(BEFORE, True, frozenset({1})),
        ),
        ({"instruction": "q", "output": "a", "kto_tag": True}, labelled(ASKED, True)),
        (
            {"instruction": "", "input": "q", "output": "a", "system": "s", "label": False},
            labelled((SYSTEM, *ASKED), False),
        ),
        (
            {"prompt": "q", "completion": "a", "label": "spam", "kto_tag": True},
            labelled(ASKED, True),
        ),
    ],
)
def test_every_style_of_a_labelled_answer(row: dict[str, Any], expected: Example) -> None:
    assert detect([row]) == "kto"
    assert to_example(row, "kto") == expected


@pytest.mark.parametrize(("label", "desirable"), [(1, True), (0, False)])
def test_a_number_is_a_label_where_the_format_is_given(label: int, desirable: bool) -> None:
    row = {"prompt": "q", "completion": "a", "label": label}
    assert detect([row]) == "prompt-completion"  # it may be a label of anything
    assert to_example(row, "kto").desirable is desirable


def test_all_that_follows_the_last_question_is_judged() -> None:
    call = {"role": "assistant", "tool_calls": [CALL]}
    messages = [*BEFORE, call, {"role": "tool", "content": "r"}, answer("a")]
    assert to_example({"messages": messages, "label": True}, "kto").silent == {1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "chosen": "a"}, ["no 'rejected'"]),
        ({"prompt": "q", "chosen": "a", "rejected": None}, ["no 'rejected'"]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["'chosen' and 'rejected' are the same"]),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, ["'rejected' is empty"]),
        ({"prompt": "q", "chosen": [], "rejected": "a"}, ["'chosen' is empty"]),
        ({"prompt": "q", "chosen": 1, "rejected": "a"}, ["'chosen' is a number", "a list of messages"]),
        ({"prompt": "q", "chosen": ["x"], "rejected": "a"}, ["message 1 of 'chosen' is a string"]),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "a"}, ["'chosen' is not valid Unicode"]),
        ({"prompt": "", **STRINGS}, ["'prompt' is empty"]),
        ({"question": [], **STRINGS}, ["'question' is empty"]),
        (STRINGS, ["no prompt", "'prompt'", "'messages'", "'instruction'"]),
        ({"messages": [], **STRINGS}, ["'chosen' opens the conversation"]),
        ({"messages": [SYSTEM], **STRINGS}, ["'chosen' opens the conversation"]),
        ({"messages": [user("q"), answer("a")], **STRINGS}, ["message 2 (assistant)", "nothing is asked"]),
        ({"instruction": "", **STRINGS}, ["'instruction' and 'input' are both empty"]),
        ({"prompt": "q", **MESSAGES, "rejected": user("b")}, ["'rejected' is a whole conversation"]),
        (
            {"prompt": "q", "chosen": [{"role": "tool", "content": "r"}, answer("a")], "rejected": "b"},
            ["message 1 of 'chosen' (tool)", "begins the answer"],
        ),
        (
            {"prompt": "q", "chosen": [answer("a"), user("r")], "rejected": "b"},
            ["'chosen' does not end in an assistant message"],
        ),
        (
            {"prompt": "q", "chosen": answer("a", weight=0), "rejected": "b"},
            ["none of its answers"],
        ),
        (
            {"chosen": [*ASKED, answer("a")], "rejected": "b"},
            ["'chosen' is a whole conversation and 'rejected' an answer"],
        ),
        (
            {"chosen": [*ASKED, answer("a")], "rejected": [user("r"), answer("b")]},
            ["the prompts of 'chosen' and 'rejected' differ"],
        ),
        (
            {"chosen": [SYSTEM, user("q"), answer("a")], "rejected": [SYSTEM, user("r"), answer("b")]},
            ["the prompts of 'chosen' and 'rejected' differ"],
        ),
        (
            {
                "chosen": [*LATER_SHARED, user("q"), answer("a")],
                "rejected": [*LATER_SHARED, user("r"), answer("b")],
            },
            ["differ", "message 3 of 'chosen' (user)"],
        ),
        ({"chosen": [*ASKED], "rejected": [*ASKED, answer("b")]}, ["'chosen' has no assistant message"]),
        (
            {"chosen": [*ASKED, answer("a"), user("r")], "rejected": [*ASKED, answer("b")]},
            ["'chosen' does not end in an assistant message"],
        ),
        (
            {"chosen": [*ASKED, answer("a")], "rejected": [*ASKED, answer("a")]},
            ["'chosen' and 'rejected' are the same"],
        ),
        (
            {"prompt": "other", "chosen": [*ASKED, answer("a")], "rejected": [*ASKED, answer("b")]},
            ["its prompt is not in 'chosen'"],
        ),
    ],
)
def test_mistakes_in_pairs(row: dict[str, Any], words: list[str]) -> None:
    told = refusal(row, "preference")
    assert [word for word in words if word not in told] == [], told


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "completion": "a"}, ["no 'kto_tag' or 'label'"]),
        ({"prompt": "q", "completion": "a", "lable": True}, ["did you mean 'label' by 'lable'"]),
        ({"prompt": "q", "completion": "a", "label": "yes"}, ["'label' is a string", "true (desirable)"]),
        ({"prompt": "q", "completion": "a", "label": 2}, ["'label' is a number"]),
        ({"prompt": "q", "completion": "a", "label": 1.0}, ["'label' is a number"]),
        ({"prompt": "q", "completion": "a", "kto_tag": [True]}, ["'kto_tag' is a list"]),
        ({"prompt": "q", "completion": " ", "label": True}, ["'completion' is empty"]),
        ({"prompt": "q", "completion": [], "label": True}, ["the completion does not end in an assistant"]),
        ({"prompt": "q", "label": True}, ["no 'completion' or 'response'"]),
        ({"instruction": "q", "label": True}, ["no 'output'"]),
        ({"text": "q", "label": True}, ["no 'messages' or 'conversations' or 'prompt' or 'instruction'"]),
        ({"messages": [], "label": True}, ["the conversation does not end in an assistant message"]),
        ({"messages": [*ASKED], "label": True}, ["the conversation does not end in an assistant message"]),
        (
            {"messages": [*ASKED, answer("a"), user("r")], "label": True},
            ["the conversation does not end in an assistant message"],
        ),
        ({"messages": [answer("a")], "label": True}, ["message 1 (assistant) opens the conversation"]),
        ({"messages": [*ASKED, answer("a", train=False)], "label": True}, ["none of its answers"]),
        ({"messages": [*ASKED, answer("")], "label": True}, ["message 2 (assistant) is empty"]),
    ],
)
def test_mistakes_in_labelled_answers(row: dict[str, Any], words: list[str]) -> None:
    told = refusal(row, "kto")
    assert [word for word in words if word not in told] == [], told
