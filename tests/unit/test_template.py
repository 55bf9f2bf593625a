"""Training and serving see the same tokens: the contract of `Encoder`, on chat formats of several families.

For every supervised turn, what stands before it is, token for token, the prompt that a server would send. Random
conversations with tools, calls and reasoning are in `test_serving`.
"""

from __future__ import annotations

import copy
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raytune_ds.data.formats import Example, RowError
from raytune_ds.data.labels import Label
from raytune_ds.data.template import Encoded, Encoder, coloured
from raytune_ds.model.tiny import BOS, EOS
from tests.families import FAMILIES, Message, Tokenizers, load_tokenizer, make_tokenizers


@pytest.fixture(scope="module")
def tokenizers(tiny_models: dict[str, Path]) -> Tokenizers:
    """A tokenizer for each family."""
    return make_tokenizers(tiny_models)


def serve(
    tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None = None, **switch: bool
) -> list[int]:
    """The ids that a server makes of a conversation that waits for an answer."""
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, **switch
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def without_thinking(family: str) -> tuple[dict[str, bool], str]:
    """How a server has a family answer without reasoning, and how such an answer begins where the prompt opens it."""
    return {"enable_thinking": False} if family == "qwen3" else {}, "</think>\n\n" if family == "r1" else ""


def supervised_runs(sequences: list[Encoded]) -> list[tuple[list[int], list[int]]]:
    """(all ids before it, its own ids) of every unbroken supervised stretch."""
    runs = []
    for sequence in sequences:
        assert len(sequence.ids) == len(sequence.weights)
        start = 0
        for weight, group in groupby(sequence.weights):
            end = start + len(list(group))
            if weight:
                assert weight == 1
                runs.append((sequence.ids[:start], sequence.ids[start:end]))
            start = end
    return runs


def said(*contents: str, system: str | None = None) -> list[Message]:
    """A conversation, the user first."""
    roles = ["user", "assistant"] * len(contents)
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


# Visible at both ends: what templates do to outer spaces differs, and formats let nothing blank through.
ends = st.sampled_from([*"aZ7.é中あ😀", "</b>", "ß"])
middle = st.text(alphabet=st.sampled_from([*"abc 0189\n\t,.中文字é😀ا<>"]), max_size=12)
contents = st.builds(lambda a, b, c: a + b + c, ends, middle, ends)


@st.composite
def conversations(draw: st.DrawFn, answers: st.SearchStrategy[str] = contents) -> list[Message]:
    turns = draw(st.lists(st.tuples(contents, answers), min_size=1, max_size=4))
    system = draw(st.none() | contents)
    return said(*(text for turn in turns for text in turn), system=system)


light = settings(max_examples=40, deadline=None)


def check_contract(
    tokenizer: Any, end: str, messages: list[Message], turns: list[str], **switch: bool
) -> list[Encoded]:
    """Every turn is supervised once, behind what is seen when serving; `turns` are their texts without the end."""
    sequences = Encoder(tokenizer).encode(Example(tuple(messages)))
    runs = supervised_runs(sequences)
    positions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(runs) == len(positions)
    for (before, own), position, turn in zip(runs, positions, turns, strict=True):
        assert before == serve(tokenizer, messages[:position], **switch)
        assert tokenizer.decode(own) == turn + end
    return sequences


@pytest.mark.parametrize("family", ["tiny", "tiny-qwen2", "qwen3", "closed"])
@light
@given(messages=conversations())
def test_the_context_of_every_turn_is_what_is_seen_when_serving(
    tokenizers: Tokenizers, family: str, messages: list[Message]
) -> None:
    """Families that `test_serving` leaves out; Qwen3's prompt closes thinking by its switch."""
    switch, _ = without_thinking(family)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    sequences = check_contract(tokenizers[family], FAMILIES[family].end, messages, answers, **switch)
    assert family == "qwen3" or len(sequences) == 1


@pytest.mark.parametrize("family", FAMILIES)
@light
@given(messages=conversations(), data=st.data(), last_turn_only=st.booleans())
def test_turns_that_are_not_trained_on_are_context(
    tokenizers: Tokenizers, family: str, messages: list[Message], data: st.DataObject, last_turn_only: bool
) -> None:
    tokenizer, end = tokenizers[family], FAMILIES[family].end
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    silent = data.draw(st.sets(st.sampled_from(answers)).map(frozenset)) - {answers[-1]}
    sequences = Encoder(tokenizer, last_turn_only).encode(Example(tuple(messages), silent=silent))
    trained = [i for i in answers if i not in silent]
    expected = trained[-1:] if last_turn_only else trained
    runs = supervised_runs(sequences)
    switch, opened = without_thinking(family)
    assert [before for before, _ in runs] == [serve(tokenizer, messages[:i], **switch) for i in expected]
    assert [tokenizer.decode(own) for _, own in runs] == [
        opened + messages[i]["content"] + end for i in expected
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_separator_behind_the_end_token_is_not_supervised(tokenizers: Tokenizers, family: str) -> None:
    tokenizer = tokenizers[family]
    for sequence in Encoder(tokenizer).encode(Example(tuple(said("a?", "b.", "c?", "d.")))):
        end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
        assert (sequence.ids[-1], sequence.weights[-1]) == (end, 1.0)
        assert all(
            sequence.ids[i] == end
            for i, w in enumerate(sequence.weights[:-1])
            if w and not sequence.weights[i + 1]
        )


def test_outer_spaces_go_where_the_template_trims_them(tokenizers: Tokenizers) -> None:
    messages = said("a?", "  b.\n", "c?", "d.")
    check_contract(tokenizers["llama3"], "<|eot_id|>", messages, ["b.", "d."])
    check_contract(tokenizers["tiny"], EOS, messages, ["  b.\n", "d."])


@pytest.mark.parametrize("family", ["tiny", "llama3", "r1", "v3.1"])
def test_there_is_one_bos_though_the_tokenizer_adds_one_too(tokenizers: Tokenizers, family: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizers[family])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # the trap is set
    for sequence in Encoder(tokenizer).encode(Example(tuple(said("a?", "b.", "c?", "d.")))):
        assert sequence.ids[0] == tokenizer.bos_token_id
        assert sequence.ids.count(tokenizer.bos_token_id) == 1
    (raw,) = Encoder(tokenizer).encode(Example(text="x"))
    assert raw.ids.count(tokenizer.bos_token_id) == 1


# ---- tools ----------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "天气",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def call(content: str = "") -> Message:
    function = {"name": "weather", "arguments": {"city": "上海", "days": 3}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": function}],
    }


def test_tools_and_calls_are_rendered_and_tool_outputs_not_supervised(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["tiny"]
    messages = [
        *said("Weather?", system="Be brief."),
        call("Let me look."),
        {"role": "tool", "content": "rain 12"},
        {"role": "tool", "content": "sun 30"},
        {"role": "assistant", "content": "Rain, then sun."},
    ]
    (sequence,) = Encoder(tokenizer).encode(Example(tuple(messages), tuple(TOOLS)))
    runs = supervised_runs([sequence])
    assert runs[0][0] == serve(tokenizer, messages[:2], TOOLS)
    assert runs[1][0] == serve(tokenizer, messages[:5], TOOLS)
    assert [tokenizer.decode(own) for _, own in runs] == [
        "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '{"city": "上海", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + EOS,
        "Rain, then sun." + EOS,
    ]
    whole = tokenizer.decode(sequence.ids)
    assert '"name": "weather"' in whole
    assert "rain 12" in whole


def test_a_bare_call_is_supervised_too(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["tiny"]
    sequences = Encoder(tokenizer).encode(Example((*said("Weather?"), call()), tuple(TOOLS)))
    ((_, own),) = supervised_runs(sequences)
    assert tokenizer.decode(own).startswith("<｜tool▁calls▁begin｜>")


@pytest.mark.parametrize("family", ["closed", "qwen3"])
def test_a_call_that_the_template_would_lose_is_not_trained_as_silence(
    tokenizers: Tokenizers, family: str
) -> None:
    """An answer of the end token alone would teach the model to say nothing where it should call."""
    with pytest.raises(RowError, match="leaves out its tool call"):
        Encoder(tokenizers[family]).encode(Example((*said("Weather?"), call()), tuple(TOOLS)))


def test_talk_of_a_call_is_not_taken_for_it(tokenizers: Tokenizers) -> None:
    """R1's template shows a call only where nothing else is said."""
    talk = call("I'll ask weather.")
    with pytest.raises(RowError, match="leaves out its tool call"):
        Encoder(tokenizers["r1"]).encode(Example((*said("Weather?"), talk), tuple(TOOLS)))
    (sequence,) = Encoder(tokenizers["v3"]).encode(Example((*said("Weather?"), talk), tuple(TOOLS)))
    assert "I'll ask weather.<｜tool▁calls▁begin｜>" in tokenizers["v3"].decode(sequence.ids)


def test_the_end_token_is_the_templates_own_where_the_rest_is_written_here(tokenizers: Tokenizers) -> None:
    """A template that does not begin a finished turn as it prompts for it."""
    tokenizer = copy.deepcopy(tokenizers["llama3"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "header('assistant') if add_gen", "header('assistant') + '!' if add_gen"
    )
    check_contract(tokenizer, "<|eot_id|>", said("a?", "b."), ["b."])


def test_every_token_is_one_that_the_model_knows(tiny_models: dict[str, Path]) -> None:
    for name, folder in tiny_models.items():
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        unknown = {t: i for t, i in load_tokenizer(folder).get_vocab().items() if i >= vocab_size}
        assert not unknown, name


# ---- answers that are judged -----------------------------------------------------------------------


def pair_of(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Example:
    silent = frozenset(i for i, message in enumerate(prompt) if message["role"] == "assistant")
    loser = Example((*prompt, *rejected), silent=silent)
    return Example((*prompt, *chosen), silent=silent, rejected=loser)


@pytest.mark.parametrize("family", FAMILIES)
@light
@given(messages=conversations(), other=contents)
def test_a_pair_is_two_answers_to_what_is_seen_when_serving(
    tokenizers: Tokenizers, family: str, messages: list[Message], other: str
) -> None:
    tokenizer, end = tokenizers[family], FAMILIES[family].end
    switch, opened = without_thinking(family)
    assume(other != messages[-1]["content"])
    prompt, answers = messages[:-1], [messages[-1]["content"], other]
    pair = Encoder(tokenizer).encode(
        pair_of(prompt, messages[-1:], [{"role": "assistant", "content": other}])
    )
    assert [sequence.label for sequence in pair] == [Label.CHOSEN, Label.REJECTED]
    runs = supervised_runs(pair)
    assert [before for before, _ in runs] == [serve(tokenizer, prompt, **switch)] * 2
    assert [tokenizer.decode(own) for _, own in runs] == [opened + answer + end for answer in answers]


@pytest.mark.parametrize("desirable", [True, False])
def test_a_label_goes_with_its_answer(tokenizers: Tokenizers, desirable: bool) -> None:
    messages = said("a?", "b.", "c?", "d.")
    example = Example(tuple(messages), silent=frozenset({1}), desirable=desirable)
    (sequence,) = Encoder(tokenizers["tiny"]).encode(example)
    assert sequence.label == (Label.DESIRABLE if desirable else Label.UNDESIRABLE)
    ((before, _),) = supervised_runs([sequence])
    assert before == serve(tokenizers["tiny"], messages[:3])


def test_other_sequences_have_no_label(tokenizers: Tokenizers) -> None:
    for example in (Example(tuple(said("a?", "b.", "c?", "d."))), Example(text="x")):
        assert {sequence.label for sequence in Encoder(tokenizers["r1"]).encode(example)} == {Label.PLAIN}


@pytest.mark.parametrize(("family", "num_trained"), [("tiny", 2), ("r1", 1)])
def test_an_answer_in_steps_is_one_sequence(tokenizers: Tokenizers, family: str, num_trained: int) -> None:
    """Under a template that keeps the steps in one sequence all of them are trained on, else the last one alone."""
    prompt, steps = said("a?"), said("b?", "c.")
    chosen = [{"role": "assistant", "content": "first"}, *steps]
    pair = Encoder(tokenizers[family]).encode(pair_of(prompt, chosen, said("x", "y", "z", "w")[1:]))
    assert len(pair) == 2
    runs = supervised_runs(pair[:1])
    assert len(runs) == num_trained
    assert runs[-1][0] == serve(tokenizers[family], [*prompt, *chosen[:-1]])
    assert tokenizers[family].decode(runs[-1][1]) == without_thinking(family)[1] + "c." + EOS


def test_a_pair_that_is_rendered_alike_teaches_nothing(tokenizers: Tokenizers) -> None:
    answers = [[{"role": "assistant", "content": content}] for content in ("b.", "b. ")]
    pair = pair_of(said("a?"), *answers)
    assert len(Encoder(tokenizers["tiny"]).encode(pair)) == 2
    with pytest.raises(RowError, match="the same of its chosen and its rejected answer"):
        Encoder(tokenizers["llama3"]).encode(pair)


def test_what_looks_like_control_in_a_rejected_answer_is_text(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["tiny"]
    sides = [[{"role": "assistant", "content": content}] for content in ("b.", f"c{EOS}d")]
    _, rejected = Encoder(tokenizer).encode(pair_of(said("a?"), *sides))
    assert rejected.ids.count(tokenizer.eos_token_id) == 1  # the end alone


# ---- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Plain text.", "中文 and 3.14", "ends itself" + EOS, BOS + "begins itself"])
def test_raw_text_is_all_supervised_between_one_bos_and_one_eos(tiny_tokenizer: Any, text: str) -> None:
    (sequence,) = Encoder(tiny_tokenizer).encode(Example(text=text))
    assert sequence.weights == [1.0] * len(sequence.ids)
    assert tiny_tokenizer.decode(sequence.ids) == BOS + text.removeprefix(BOS).removesuffix(EOS) + EOS


def test_raw_text_gets_no_bos_or_eos_that_the_tokenizer_has_not(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    (sequence,) = Encoder(tokenizer).encode(Example(text="Plain text."))
    assert tokenizer.decode(sequence.ids) == "Plain text."


def test_raw_text_needs_no_chat_template(tiny_tokenizer: Any) -> None:
    base = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    text = Example(text="Plain text.")
    assert Encoder(base).encode(text) == Encoder(tiny_tokenizer).encode(text)


def test_a_part_keeps_the_label() -> None:
    whole = Encoded([1, 2, 3], [0.0, 1.0, 1.0], Label.REJECTED)
    assert whole.part(0, 2) == Encoded([1, 2], [0.0, 1.0], Label.REJECTED)


def test_the_first_token_is_never_a_target() -> None:
    assert Encoded([1, 2, 3], [1.0, 1.0, 0.0]).num_supervised == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content | dictsort }}",
        "{{ 1 / (messages | length - 1) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% if %}",
    ],
)
def test_a_template_that_refuses_is_an_error_of_the_row(tiny_tokenizer: Any, template: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(RowError, match=r"the chat template refuses it: ."):
        Encoder(tokenizer).encode(Example(tuple(said("a?", "b."))))


def test_what_is_supervised_is_coloured_and_nothing_else(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["tiny"]
    (sequence,) = Encoder(tokenizer).encode(Example(tuple(said("Wie geht’s?", "好 7.", "And?", "Fine."))))
    text = coloured(sequence, tokenizer)
    assert text.plain == tokenizer.decode(sequence.ids)
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"]
    assert green == ["好 7." + EOS, "Fine." + EOS]
    dim = [text.plain[span.start : span.end] for span in text.spans if span.style == "dim"]
    assert len("".join(green + dim)) == len(text.plain)
