"""What data.thinking makes of the reasoning of answers, in the chat formats that differ in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.data.chat import as_trained
from raytune_ds.data.formats import Example, RowError
from raytune_ds.data.template import Encoder
from raytune_ds.data.thinking import BARRED, DROPPED, ENDED, KEPT, NONE, Thinking, part
from tests.families import FAMILIES, Message, Tokenizers, make_tokenizers
from tests.unit.test_template import call, said, serve, supervised_runs

ON, OFF = " in thinking mode", " in non-thinking mode"
INLINE = "<think>\nHm.\n</think>\n\nYes."


@pytest.fixture(scope="module")
def tokenizers(tiny_models: dict[str, Path]) -> Tokenizers:
    """A tokenizer for each family."""
    return make_tokenizers(tiny_models)


def answer(content: str = "Yes.", reasoning: str | None = None, **more: Any) -> Message:
    field = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": content, **field, **more}


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        (answer(), "", "Yes."),
        (answer(INLINE), "Hm.", "Yes."),
        (answer(" <think> Hm. </think> Yes. "), "Hm.", "Yes. "),
        (answer("<think>a</think>b</think>c"), "a", "b</think>c"),
        (answer("Yes.", "\nHm.\n"), "Hm.", "Yes."),
        (answer("\n\nYes.", "Hm."), "Hm.", "Yes."),
        (answer("<think>\n\n</think>\n\nYes."), "", "Yes."),
        (answer("<think></think>Yes.", "Hm."), "Hm.", "Yes."),
        (answer(INLINE, "other"), "Hm.", "Yes."),
        # as a model writes it behind a prompt that has opened it
        (answer("Hm.\n</think>\n\nYes."), "Hm.", "Yes."),
        # talked about
        (answer("A </think> ends it."), "", "A </think> ends it."),
        (answer("See:\n</think> ends it."), "", "See:\n</think> ends it."),
        (answer("Tags:\n<think>\n</think>\nare two."), "", "Tags:\n<think>\n</think>\nare two."),
        (answer("<think>never ended"), "", "<think>never ended"),
    ],
)
def test_a_message_in_two(message: Message, reasoning: str, content: str) -> None:
    assert part(message) == (reasoning, {"role": "assistant", "content": content})


def test_what_has_no_reasoning_is_left_as_it_is() -> None:
    message = call("Let me look.")
    assert part(message).bare is message


def trained(
    tokenizers: Tokenizers, family: str, thinking: Thinking, *messages: Message
) -> tuple[str, str, dict[str, int]]:
    """The end of the last turn's prompt, what is trained on behind it, and the counts."""
    encoder = Encoder(tokenizers[family], thinking=thinking)
    *_, (context, own) = supervised_runs(encoder.encode(Example((*said("Sure?"), *messages))))
    decode = tokenizers[family].decode
    text = decode(own)
    assert text.endswith(FAMILIES[family].end)
    return decode(context)[-30:], text.removesuffix(FAMILIES[family].end), dict(encoder.turns)


@pytest.mark.parametrize("message", [answer(INLINE), answer("Yes.", "Hm."), answer("<think>Hm.</think>Yes.")])
@pytest.mark.parametrize(
    ("family", "thinking", "prompt", "text", "fate"),
    [
        ("r1", "keep", "<｜Assistant｜><think>\n", "Hm.\n</think>\n\nYes.", KEPT),
        ("r1", "auto", "<｜Assistant｜><think>\n", "Hm.\n</think>\n\nYes.", KEPT),
        ("r1", "drop", "<｜Assistant｜><think>\n", "</think>\n\nYes.", DROPPED),
        ("v3.1", "keep", "<｜Assistant｜><think>", "Hm.</think>Yes.", KEPT + ON),
        ("v3.1", "auto", "<｜Assistant｜><think>", "Hm.</think>Yes.", KEPT + ON),
        ("v3.1", "drop", "<｜Assistant｜></think>", "Yes.", DROPPED + OFF),
        ("qwen3", "drop", "assistant\n<think>\n\n</think>\n\n", "Yes.", DROPPED + OFF),
        ("closed", "keep", "<｜Assistant｜></think>", INLINE, KEPT),
        ("closed", "auto", "<｜Assistant｜></think>", "Yes.", BARRED),
        ("closed", "drop", "<｜Assistant｜></think>", "Yes.", DROPPED),
        ("v3", "drop", "<｜Assistant｜>", "Yes.", DROPPED),
    ],
)
def test_reasoning(
    tokenizers: Tokenizers,
    message: Message,
    family: str,
    thinking: Thinking,
    prompt: str,
    text: str,
    fate: str,
) -> None:
    seen, own, counts = trained(tokenizers, family, thinking, message)
    assert seen.endswith(prompt)
    assert own == text
    assert counts == {fate: 1}


@pytest.mark.parametrize(
    ("family", "thinking", "prompt", "text", "fate"),
    [
        ("r1", "keep", "<think>\n", "</think>\n\nYes.", ENDED),
        ("r1", "auto", "<think>\n", "</think>\n\nYes.", ENDED),
        ("r1", "drop", "<think>\n", "</think>\n\nYes.", ENDED),
        ("v3.1", "keep", "<think>", "</think>Yes.", ENDED + ON),
        ("v3.1", "auto", "<｜Assistant｜></think>", "Yes.", NONE + OFF),
        ("qwen3", "keep", "assistant\n", "<think>\n\n</think>\n\nYes.", ENDED + ON),
        ("qwen3", "auto", "</think>\n\n", "Yes.", NONE + OFF),
        ("closed", "keep", "</think>", "Yes.", NONE),
        ("v3", "keep", "<｜Assistant｜>", "Yes.", NONE),
    ],
)
@pytest.mark.parametrize("content", ["Yes.", "<think>\n\n</think>\n\nYes."])
def test_no_reasoning(
    tokenizers: Tokenizers, content: str, family: str, thinking: Thinking, prompt: str, text: str, fate: str
) -> None:
    if family == "v3" and content != text:
        text, fate = content, ENDED  # nothing is opened, and the template writes what it is told
    seen, own, counts = trained(tokenizers, family, thinking, answer(content))
    assert seen.endswith(prompt)
    assert own == text
    assert counts == {fate: 1}


@pytest.mark.parametrize("message", [answer(INLINE), answer("Yes.", "Hm.")])
def test_a_template_that_renders_reasoning_itself_is_left_to_it(
    tokenizers: Tokenizers, message: Message
) -> None:
    for thinking in ("keep", "auto"):
        assert trained(tokenizers, "qwen3", thinking, message)[1] == INLINE
    opening = copy.deepcopy(tokenizers["qwen3"])
    opening.chat_template = opening.chat_template.replace(
        "'<|im_start|>assistant\\n' +", "'<|im_start|>assistant\\n<think>\\n' +"
    )
    prompt, own, _ = trained({"qwen3": opening}, "qwen3", "keep", message)
    assert (prompt[-8:], own) == ("<think>\n", INLINE.removeprefix("<think>\n"))
    assert trained({"qwen3": opening}, "qwen3", "keep", answer())[1] == "\n</think>\n\nYes."


def test_each_turn_is_taken_by_itself(tokenizers: Tokenizers) -> None:
    messages = said("a?", "A.", "b?", "<think>Hm.</think>B.", "c?", "C.")
    encoder = Encoder(tokenizers["v3.1"])
    runs = supervised_runs(encoder.encode(Example(tuple(messages))))
    modes = [False, True, False]
    for (context, _), position, thinking in zip(runs, (1, 3, 5), modes, strict=True):
        assert context == serve(tokenizers["v3.1"], messages[:position], thinking=thinking)
    assert encoder.turns == {NONE + OFF: 2, KEPT + ON: 1}


def test_what_is_dropped_is_no_context_either(tokenizers: Tokenizers) -> None:
    messages = said("a?", INLINE, "b?", "B.")
    [sequence] = Encoder(tokenizers["v3"], thinking="drop").encode(Example(tuple(messages)))
    assert "Hm." not in tokenizers["v3"].decode(sequence.ids)
    kept = Encoder(tokenizers["v3"], thinking="keep").encode(Example(tuple(messages)))
    assert "Hm." in tokenizers["v3"].decode(kept[0].ids)


@pytest.mark.parametrize(("family", "thinking"), [("v3", "drop"), ("closed", "auto")])
@pytest.mark.parametrize("content", ["<think>Hm.</think>", "<think>\n</think>\n"])
def test_an_answer_of_reasoning_alone_is_not_trained_as_silence(
    tokenizers: Tokenizers, family: str, thinking: Thinking, content: str
) -> None:
    with pytest.raises(RowError, match="nothing is left of one of its answers without its reasoning"):
        trained(tokenizers, family, thinking, answer(content))


def test_a_row_that_fails_is_not_counted(tokenizers: Tokenizers) -> None:
    encoder = Encoder(tokenizers["v3"], thinking="drop")
    with pytest.raises(RowError):
        encoder.encode(Example(tuple(said("a?", "A.", "b?", "<think>Hm.</think>"))))
    assert not encoder.turns


def test_reasoning_goes_before_a_call_behind_a_prompt_that_opens_it(tokenizers: Tokenizers) -> None:
    called = call() | {"reasoning_content": "Hm."}
    _, own, _ = trained(tokenizers, "r1", "auto", called)
    assert own.startswith("Hm.\n</think>\n\n<｜tool▁calls▁begin｜>")
    _, own, _ = trained(tokenizers, "v3.1", "auto", called)
    assert own.startswith("Hm.</think><｜tool▁calls▁begin｜>")
    _, own, _ = trained(tokenizers, "v3.1", "keep", call())
    assert own.startswith("</think><｜tool▁calls▁begin｜>")


def test_reasoning_that_says_the_same_as_the_answer_is_not_taken_for_it(tokenizers: Tokenizers) -> None:
    assert trained(tokenizers, "v3", "auto", answer("Yes.", "Yes."))[1] == "<think>\nYes.\n</think>\n\nYes."


def test_a_template_that_refuses_has_no_switch(tokenizers: Tokenizers) -> None:
    refusing = copy.deepcopy(tokenizers["v3"])
    refusing.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(RowError, match="refuses it: no"):
        trained({"v3": refusing}, "v3", "auto", answer())


def test_what_a_prompt_opens_is_closed_though_the_template_leaves_it_open(tokenizers: Tokenizers) -> None:
    opening = copy.deepcopy(tokenizers["v3"])
    opening.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + ('<think>\n' if m.role == 'assistant' else '') + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>\n' }}{% endif %}"
    )
    assert trained({"v3": opening}, "v3", "auto", answer())[1] == "</think>\n\nYes."


def test_arguments_are_json_where_a_template_would_write_them_as_python_does(tokenizers: Tokenizers) -> None:
    writing = copy.deepcopy(tokenizers["tiny"])
    writing.chat_template = (
        "{% for m in messages %}{{ m.role ~ ':' ~ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name ~ call.function.arguments }}{% endfor %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert trained({"tiny": writing}, "tiny", "auto", call())[1] == 'weather{"city": "上海", "days": 3}'


@pytest.mark.parametrize(
    ("thinking", "end"), [("keep", "<think>"), ("drop", "</think>"), ("auto", "</think>")]
)
@pytest.mark.parametrize(("family", "closed"), [("v3.1", "</think>"), ("qwen3", "</think>\n\n")])
def test_a_finished_model_is_asked_in_the_mode_that_it_was_trained_in(
    tokenizers: Tokenizers, thinking: Thinking, end: str, family: str, closed: str
) -> None:
    """By whoever says nothing of it; who sets the switch is heard."""
    tokenizer = copy.deepcopy(tokenizers[family])
    tokenizer.chat_template = as_trained(tokenizer, thinking)
    asked = said("Well?")
    if thinking == "auto":
        assert tokenizer.chat_template == tokenizers[family].chat_template
    else:
        on = {"thinking": thinking == "keep", "enable_thinking": thinking == "keep"}
        assert serve(tokenizer, asked) == serve(tokenizers[family], asked, **on)
    off = {"thinking": False, "enable_thinking": False}
    assert tokenizer.decode(serve(tokenizer, asked, **off)).endswith(closed)


def test_both_answers_of_a_pair_are_to_the_same_prompt(tokenizers: Tokenizers) -> None:
    """One of them reasons, so the other ends its reasoning at once."""
    rejected = Example((*said("Well?"), answer("No.")))
    pair = Encoder(tokenizers["v3.1"]).encode(Example((*said("Well?"), answer(INLINE)), rejected=rejected))
    (before, chosen), (other, refused) = supervised_runs(pair)
    assert before == other
    assert tokenizers["v3.1"].decode(before).endswith("<think>")
    assert tokenizers["v3.1"].decode(chosen).startswith("Hm.</think>Yes.")
    assert tokenizers["v3.1"].decode(refused).startswith("</think>No.")
