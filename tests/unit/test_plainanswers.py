"""An answer of which only the shape was looked at is what the template makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds.data.formats import Example, RowError
from raytune_ds.data.plainanswers import PlainAnswers
from raytune_ds.data.template import Encoder
from raytune_ds.model.tiny import EOS
from tests.families import FAMILIES, Message, Tokenizers
from tests.unit.test_template import call, contents, said, supervised_runs, tokenizers

__all__ = ["tokenizers"]
light = settings(max_examples=60, deadline=None)

TOOLS = ({"type": "function", "function": {"name": "find", "description": "d", "parameters": {}}},)
spoken = contents | st.sampled_from(
    [" outer spaces\n", "<think>\nwhy\n</think>\n\nso", "</think>", "a<think>b"]
)
questions = contents | st.just("<tool_response>\nfound\n</tool_response>")
steps = st.sampled_from(
    [[], *([call(talk), {"role": "tool", "content": "found"}] for talk in ("", "I look."))]
)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """With a system prompt or none, reasoning or none, calls or none."""
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents | st.just(""))})
    for asked, between, answered in draw(
        st.lists(st.tuples(questions, steps, spoken), min_size=1, max_size=3)
    ):
        messages += [{"role": "user", "content": asked}, *between, {"role": "assistant", "content": answered}]
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["reasoning_content"] = "because"
    return Example(tuple(messages), TOOLS if draw(st.booleans()) else ())


class _Never(PlainAnswers):
    def written(self, *_: Any) -> None:
        return None


def encoded(encoder: Encoder, example: Example) -> Any:
    try:
        return encoder.encode(example)
    except RowError as error:
        return str(error)


@pytest.mark.parametrize("thinking", ["keep", "drop", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
@light
@given(data=st.data())
def test_it_is_what_is_rendered(
    tokenizers: Tokenizers, family: str, thinking: Any, data: st.DataObject
) -> None:
    shapes, rendering = (Encoder(tokenizers[family], thinking=thinking) for _ in range(2))
    rendering._plain = _Never(rendering._template)
    for example in data.draw(st.lists(examples(), min_size=1, max_size=3)):
        assert encoded(shapes, example) == encoded(rendering, example)
    assert shapes.turns == rendering.turns


def num_finished(encoder: Encoder, messages: list[Message], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many finished conversations are rendered for an example."""
    finished, render = list[bool](), encoder._template.render

    def noted(*given: Any, generate: bool, **switch: Any) -> str:
        finished.append(not generate)
        return render(*given, generate=generate, **switch)

    with monkeypatch.context() as patch:
        patch.setattr(encoder._template, "render", noted)
        encoder.encode(Example(tuple(messages)))
    return sum(finished)


def test_a_shape_is_looked_at_once(tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tokenizers["qwen3"])
    assert num_finished(encoder, said("a", "b", "c", "d"), monkeypatch) == 2 * 2  # two turns, two answers
    assert num_finished(encoder, said("e", "f", "g", "h"), monkeypatch) == 0
    assert num_finished(encoder, said("e", "f", "g", "h", "i", "j"), monkeypatch) == 2


@pytest.mark.parametrize(
    "answer",
    [
        "{{ m.content | upper }}",
        "{{ m.content }}{{ m.content }}",
        "{{ m.content.split('\n')[0] }}",
        "{{ m.content | length }}{{ m.content }}",
        "{{ raise_exception('no') if 'than' in m.content else m.content }}",
    ],
)
def test_a_template_that_looks_at_the_words_is_asked_each_time(
    tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    tokenizer = tokenizers["closed"]
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"
        + answer
        + "{{ eos_token }}{% endif %}{% endfor %}",
    )
    encoder = Encoder(tokenizer)
    for number in range(2):
        assert num_finished(encoder, said("a", f"b {number}"), monkeypatch) > 0


def test_words_that_change_how_the_prompt_ends(
    tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a question may turn thinking off: what the prompt has closed already is no part of the answer."""
    closed = "<think>\n\n</think>\n\n"
    template = (
        "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}"
        f"{{% if m.role == 'assistant' and loop.last %}}{closed}{{% endif %}}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<A>"
        f"{{% if '/no_think' in messages[-1].content %}}{closed}{{% endif %}}{{% endif %}}"
    )
    tokenizer = tokenizers["closed"]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    encoder = Encoder(tokenizer)
    for asked, expected in (("a", f"{closed}b"), ("a /no_think", "b"), ("c", f"{closed}b")):
        (sequence,) = encoder.encode(Example(tuple(said(asked, "b"))))
        ((_, own),) = supervised_runs([sequence])
        assert tokenizer.decode(own) == expected + EOS
