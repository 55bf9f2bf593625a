"""Rows to examples: what each format gives, and what each mistake is told."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds.data.formats import FORMATS, Example, RowError, detect, to_example

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
SPEC = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def refusal(row: Any, format: str) -> str:
    with pytest.raises(RowError) as caught:
        to_example(row, format)
    return str(caught.value)


def roles(example: Example) -> list[str]:
    return [message["role"] for message in example.messages]


# ---- what each format gives ------------------------------------------------------------------------


def test_messages():
    row = {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}
    assert to_example(row, "messages") == Example((row["messages"][0], USER, ASSISTANT))


def test_messages_with_tool_calls_tools_and_tool_results():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": null, "y": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1", "name": "f"},
        ASSISTANT,
    ]
    example = to_example({"messages": messages, "tools": json.dumps([SPEC])}, "messages")
    assert example.messages[1] == {
        "role": "assistant",
        "content": "",
        # a null inside a string of JSON was meant
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": None, "y": 1}}}
        ],
    }
    assert example.messages[2] == messages[2]
    assert example.tools == ({"type": "function", "function": SPEC},)


def test_nulls_that_parquet_fills_in_are_absent():
    arguments = {"city": "Rome", "zip": None}
    call = {"type": None, "id": None, "function": {"name": "f", "arguments": arguments}}
    messages = [
        USER | {"tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "name": None, "tool_calls": [call]},
    ]
    example = to_example({"messages": messages, "tools": None, "system": None, "text": None}, "messages")
    assert example.messages[0] == USER
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    ]
    assert example.tools == ()


def test_call_without_arguments():
    for arguments in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
        row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", **arguments}]}]}
        call = to_example(row, "messages").messages[1]["tool_calls"][0]
        assert call == {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_answers_that_are_not_to_be_trained_on_are_context(mark):
    silent, last = ASSISTANT | mark, ASSISTANT | {"weight": 1, "train": True}
    example = to_example({"messages": [USER, silent, USER, last, USER, silent]}, "messages")
    assert roles(example) == ["user", "assistant"] * 2  # nothing behind the last one is needed
    assert example.silent == {1}
    assert example.messages[1] == ASSISTANT


def test_context_may_be_empty():
    empty = {"role": "assistant", "content": "", "weight": 0}
    assert to_example({"messages": [USER, empty, USER, ASSISTANT]}, "messages").silent == {1}


def test_reasoning_is_kept():
    answer = ASSISTANT | {"reasoning_content": "hm"}
    assert to_example({"messages": [USER, answer]}, "messages").messages[1] == answer


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_reasoning_by_other_names(name):
    example = to_example({"messages": [USER, ASSISTANT | {name: "hm"}]}, "messages")
    assert example.messages[1] == ASSISTANT | {"reasoning_content": "hm"}


def test_of_two_names_of_reasoning_the_one_that_templates_know_wins():
    answer = ASSISTANT | {"reasoning_content": "hm", "reasoning": "no", "thinking": "no"}
    example = to_example({"messages": [USER, answer]}, "messages")
    assert example.messages[1] == ASSISTANT | {"reasoning_content": "hm"}


def test_sharegpt_with_function_calls():
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": '{"y": 2}'}]
    row = {
        "system": "s",
        "tools": json.dumps([SPEC]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
    }
    example = to_example(row, "sharegpt")
    assert roles(example) == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["content"] == ""
    assert [call["function"] for call in example.messages[2]["tool_calls"]] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": {"y": 2}},
    ]
    assert example.tools == ({"type": "function", "function": SPEC},)


@pytest.mark.parametrize("speaker", ["gpt", "assistant", "model", "bot"])
def test_sharegpt_roles(speaker):
    row = {"conversation": [{"from": "user", "value": "q"}, {"from": speaker, "value": "a"}]}
    assert to_example(row, "sharegpt").messages == (USER, ASSISTANT)


def test_either_spelling_of_a_message():
    assert to_example({"conversations": [USER, ASSISTANT]}, "sharegpt").messages == (USER, ASSISTANT)


def test_alpaca():
    row = {
        "instruction": "translate",
        "input": "hola",
        "output": "hello",
        "system": "s",
        "history": [["a", "b"]],
    }
    example = to_example(row, "alpaca")
    assert [message["content"] for message in example.messages] == ["s", "a", "b", "translate\nhola", "hello"]
    assert roles(example) == ["system", "user", "assistant", "user", "assistant"]
    bare = {"instruction": "i", "input": "", "output": "o", "system": "", "history": []}
    assert [message["content"] for message in to_example(bare, "alpaca").messages] == ["i", "o"]
    only_input = {"instruction": "", "input": "i", "output": "o"}
    assert to_example(only_input, "alpaca").messages[0]["content"] == "i"


@pytest.mark.parametrize("key", ["completion", "response"])
def test_prompt_completion(key):
    assert to_example({"prompt": "q", key: "a"}, "prompt-completion").messages == (USER, ASSISTANT)
    assert to_example({"prompt": [USER], key: [ASSISTANT]}, "prompt-completion").messages == (USER, ASSISTANT)


def test_text():
    assert to_example({"text": " a\0b\n"}, "text") == Example(text=" a\0b\n")


def test_what_follows_the_last_answer_is_cut_off():
    assert to_example({"messages": [USER, ASSISTANT, USER]}, "messages").messages == (USER, ASSISTANT)


def test_system_twice():
    system = {"role": "system", "content": "s"}
    row = {"system": "s", "messages": [system, USER, ASSISTANT]}
    assert roles(to_example(row, "messages")) == ["system", "user", "assistant"]
    assert "another system prompt" in refusal(row | {"system": "t"}, "messages")


# ---- what each mistake is told ---------------------------------------------------------------------


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("messages", {"mesages": []}, ["no 'messages'", "'mesages'", "did you mean 'messages'"]),
        ("messages", {"messages": "x"}, ["'messages' is a string", "a list"]),
        ("messages", {"messages": []}, ["no assistant message"]),
        ("messages", {"messages": ["x"]}, ["message 1 is a string", "an object"]),
        ("messages", {"messages": [USER, {"content": "a"}]}, ["message 2", "no 'role'", "'content'"]),
        ("messages", {"messages": [USER, {"role": "assistnt", "content": "a"}]}, ["message 2", "'assistnt'"]),
        ("messages", {"messages": [{"role": "user"}, ASSISTANT]}, ["message 1 (user)", "'content'"]),
        ("messages", {"messages": [{"role": "user", "content": 5}, ASSISTANT]}, ["message 1", "a number"]),
        ("messages", {"messages": [{"role": [], "content": ""}]}, ["role of message 1", "a list"]),
        ("messages", {"messages": [USER]}, ["no assistant message"]),
        ("messages", {"messages": [ASSISTANT]}, ["message 1 (assistant)", "opens the conversation"]),
        (
            "messages",
            {"messages": [{"role": "system", "content": "s"}, ASSISTANT]},
            ["message 2 (assistant)", "opens"],
        ),
        ("messages", turn(content=" \n"), ["message 2 (assistant) is empty", "nothing to train on"]),
        ("messages", turn(content="a", weight=0), ["none of its answers", "'weight' 0"]),
        ("messages", turn(content="a", train=False), ["none of its answers", "'train' false"]),
        ("messages", turn(content="a", weight=0.5), ["'weight' of message 2", "0.5", "0 or 1"]),
        ("messages", turn(content="a", weight=True), ["'weight' of message 2", "True", "0 or 1"]),
        ("messages", turn(content="a", train="no"), ["'train' of message 2", "a string", "true or false"]),
        (
            "messages",
            {"messages": [USER | {"train": True}, ASSISTANT]},
            ["message 1", "only the assistant's"],
        ),
        ("messages", turn(content="\ud800"), ["message 2", "not valid Unicode", "U+D800"]),
        ("messages", turn(tool_calls=["x"]), ["message 2", "a string", "an object"]),
        ("messages", turn(tool_calls=[{"arguments": {}}]), ["message 2", "no 'name'"]),
        (
            "messages",
            turn(tool_calls=[{"name": "f", "arguments": "{"}]),
            ["arguments", "message 2", "not valid JSON"],
        ),
        (
            "messages",
            turn(tool_calls=[{"name": "f", "arguments": "[1]"}]),
            ["'arguments'", "a list", "an object"],
        ),
        ("messages", turn(tool_calls=[{"name": "f", "parameters": {}}]), ["'parameters'", "'arguments'"]),
        ("messages", turn(content="a", name=3), ["'name' of message 2", "a number"]),
        ("messages", turn(content="a") | {"tools": "{"}, ["'tools'", "not valid JSON"]),
        ("messages", turn(content="a") | {"tools": "9" * 5000}, ["'tools'", "not valid JSON"]),
        ("messages", turn(content="a") | {"tools": {"name": "f"}}, ["'tools' is an object", "a list"]),
        ("messages", turn(content="a") | {"tools": [{"nam": "f"}]}, ["tool 1", "'name'", "'nam'"]),
        ("messages", turn(content="a") | {"tools": [{"name": "\udc00"}]}, ["'tools'", "Unicode"]),
        ("messages", turn(content="a") | {"system": 3}, ["'system' is a number"]),
        ("sharegpt", {"text": "x"}, ["no 'conversations' or 'conversation'", "'text'"]),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]},
            ["message 2 (function_call)", "not valid JSON"],
        ),
        ("alpaca", {"instructions": "i", "output": "o"}, ["'instruction'", "by 'instructions'"]),
        ("alpaca", {"Instruction": "i", "output": "o"}, ["by 'Instruction'"]),
        ("alpaca", {"instruction": "i"}, ["no 'output'"]),
        ("alpaca", {"instruction": "i", "output": None}, ["no 'output'"]),
        ("alpaca", {"instruction": "i", "output": ["o"]}, ["'output' is a list", "a string"]),
        ("alpaca", {"instruction": "i", "output": " "}, ["'output' is empty"]),
        ("alpaca", {"instruction": "", "input": " ", "output": "o"}, ["'instruction' and 'input'", "empty"]),
        ("alpaca", {"instruction": "i", "output": "o\udfff"}, ["'output'", "not valid Unicode"]),
        ("alpaca", {"instruction": "i", "output": "o", "history": "x"}, ["'history' is a string"]),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["q"]]}, ["pair 1", "1 items"]),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "history": [["q", ""]]},
            ["answer in pair 1", "empty"],
        ),
        ("prompt-completion", {"prompt": "q"}, ["no 'completion' or 'response'"]),
        ("prompt-completion", {"prompt": " ", "completion": "a"}, ["'prompt' is empty"]),
        ("prompt-completion", {"prompt": [], "completion": "a"}, ["'prompt' is empty"]),
        ("prompt-completion", {"prompt": "q", "response": ""}, ["'response' is empty"]),
        ("prompt-completion", {"prompt": 1, "completion": "a"}, ["'prompt' is a number", "list of messages"]),
        (
            "prompt-completion",
            {"prompt": "q", "completion": [ASSISTANT | {"content": ""}]},
            ["message 1 of 'completion'"],
        ),
        ("text", {"txt": "x"}, ["no 'text'", "by 'txt'"]),
        ("text", {"text": "\n "}, ["'text' is empty"]),
        ("text", {"text": ["x"]}, ["'text' is a list"]),
        ("text", {"text": "a\ud83d"}, ["not valid Unicode", "character 2"]),
        ("text", {}, ["no keys at all"]),
    ],
)
def test_mistakes(format, row, words):
    told = refusal(row, format)
    assert [word for word in words if word not in told] == [], told
    told.encode()  # a message can be printed whatever the row holds


def test_depth_is_an_error_of_the_row():
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert "nested too deeply" in refusal({"text": "x", "extra": deep}, "text")


# ---- detection -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "p", "prompt_id": "1", "messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"conversation": [], "text": None}, "sharegpt"),
        ({"messages": None, "conversations": []}, "sharegpt"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"prompt": "", "completion": ""}, "prompt-completion"),
        ({"prompt": "", "response": ""}, "prompt-completion"),
        ({"text": "", "url": "", "label": True}, "text"),
        ({"messages": [], "label": 1}, "messages"),
        ({"messages": [], "chosen": "", "rejected": None}, "messages"),
        ({"messages": [], "chosen": "", "rejected": "", "label": True}, "preference"),
        ({"messages": [], "label": True}, "kto"),
        ({"instruction": "", "output": "", "kto_tag": False}, "kto"),
    ],
)
def test_detect(row, format):
    assert format in FORMATS
    assert detect([row]) == format


def test_detect_goes_with_most_rows():
    assert detect([{"bad": 1}, {"text": "a"}, {"text": "b"}, {"messages": []}]) == "text"


def test_unknown_format_tells_keys_and_needs():
    with pytest.raises(RowError) as caught:
        detect([{"instructions": "i", "answer": "a"}])
    told = str(caught.value)
    assert "'instructions', 'answer'" in told
    assert "did you mean 'instruction' by 'instructions'" in told
    assert all(f"{format} needs" in told for format in FORMATS)


def test_no_rows():
    with pytest.raises(RowError, match="no row"):
        detect([])


# ---- whatever the row ------------------------------------------------------------------------------

KEYS = (
    "messages conversations prompt completion instruction output text role from content value tool_calls"
    " function name arguments tools system history label weight chosen rejected question kto_tag"
)
WORDS = st.sampled_from(KEYS.split())
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800")
    | st.sampled_from(["user", "assistant", "gpt", "human", "function_call", "{}", "[1]", '{"name": "f"}'])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": SCALARS},
        optional={"tool_calls": VALUES, "name": SCALARS, "weight": SCALARS},
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(WORDS, VALUES | TURNS, max_size=6), st.sampled_from(FORMATS))
def test_no_row_raises_anything_but_row_error(row, format):
    with contextlib.suppress(RowError):
        detect([row])
    try:
        example = to_example(row, format)
    except RowError as error:
        str(error).encode()  # printable whatever the row holds
        return
    for part in [example, *([example.rejected] if example.rejected else [])]:
        json.dumps([part.messages, part.tools, part.text], ensure_ascii=False).encode()
        if part.text is None:
            assert part.messages[-1]["role"] == "assistant"
            assert all(isinstance(message["content"], str) for message in part.messages)


ROWS = st.fixed_dictionaries(
    {"label": st.booleans()},
    optional={"prompt": VALUES | TURNS, "messages": TURNS, "system": SCALARS},
)


@settings(max_examples=400, deadline=None)
@given(ROWS, TURNS | VALUES, TURNS | VALUES, TURNS)
def test_no_judged_row_raises_anything_but_row_error(row, one, other, begin):
    """Closer to rows that can be used than the test above: both answers are there, and may begin alike."""
    sides = [[*begin, *side] if isinstance(side, list) else side for side in (one, other)]
    for judged, format in (
        (row | {"chosen": sides[0], "rejected": sides[1]}, "preference"),
        (row | {"completion": one}, "kto"),
    ):
        with contextlib.suppress(RowError):
            example = to_example(judged, format)
            assert (example.rejected is not None) == (format == "preference")
            assert (example.desirable is not None) == (format == "kto")
            assert example.rejected is None or example.rejected.messages != example.messages
