"""Random conversations in the chat formats of five families: training sees the tokens that serving sees.

For each supervised turn what stands before it are the ids that a server makes of the messages before, and its own ids
decode to what the rules of data.thinking say, and the end token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from raytune_ds.data.formats import Example
from raytune_ds.data.template import Encoder
from raytune_ds.data.thinking import Thinking
from raytune_ds.model.tiny import EOS
from tests.families import FAMILIES, Family, Message, as_sent, make_tokenizers, rendered_calls

NUM_CONVERSATIONS = 500
NAMES = ("v3", "v3.1", "r1", "qwen2.5", "llama3")
MODES: tuple[Thinking, ...] = ("keep", "drop", "auto")

Tools = list[dict[str, Any]]


class Server:
    """Makes ids of a prompt and takes no text for a control token, in a way of its own."""

    def __init__(self, family: Family, tokenizer: Any) -> None:
        """`tokenizer` is the family's."""
        self.family, self.tokenizer = family, tokenizer
        added = sorted(map(str, tokenizer.added_tokens_decoder.values()))
        # One character of the private use area for each token, which no template takes for anything.
        self.hidden = {token: chr(0xE000 + number) for number, token in enumerate(added)}
        self.seen = {char: self.plain.encode(token).ids for token, char in self.hidden.items()}

    @cached_property
    def encoders(self) -> dict[Thinking, Encoder]:
        """One for each mode of thinking; what they find out of a template they find out once."""
        return {thinking: Encoder(self.tokenizer, thinking=thinking) for thinking in MODES}

    @cached_property
    def plain(self) -> Tokenizer:
        """The tokenizer without its added tokens."""
        made = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**made, "added_tokens": [], "post_processor": None}))

    def ids(self, messages: list[Message], tools: Tools, switch: dict[str, bool]) -> list[int]:
        """The prompt behind which the next turn is written."""
        text = self.tokenizer.apply_chat_template(
            [self._hidden(m, m["role"]) for m in as_sent(self.family, messages)],
            tools=self._hidden(tools, "user") or None,
            add_generation_prompt=True,
            tokenize=False,
            **switch,
        )
        ids: list[int] = []
        for piece in re.split("([\ue000-\ue0ff])", text):
            ids += self.seen.get(piece) or self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def normalized(self, text: str) -> str:
        """The text as the tokenizer changes it, which may put combining characters together."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return str(normalizer.normalize_str(text)) if normalizer is not None else text

    def _hidden(self, value: Any, role: str) -> Any:
        if isinstance(value, dict):
            return {self._hidden(key, role): self._hidden(member, role) for key, member in value.items()}
        if isinstance(value, list):
            return [self._hidden(member, role) for member in value]
        if not isinstance(value, str):
            return value
        for token, char in self.hidden.items():
            # Tags of reasoning and calls are the assistant's own.
            if role != "assistant" or token not in self.family.added:
                value = value.replace(token, char)
        return value


@dataclass(frozen=True)
class Said:
    """An assistant's turn."""

    answer: str = ""
    reasoning: str = ""
    inline: tuple[str, str, str] | None = (
        None  # white space around the reasoning's tags; None: a field of its own
    )
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

    def message(self, thinking: Thinking) -> Message:
        """As a row has it, or without its reasoning."""
        message: Message = {"role": "assistant", "content": self.answer}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in self.calls
            ]
        if not self.reasoning or thinking == "drop":
            return message
        if self.inline is None:
            return message | {"reasoning_content": self.reasoning}
        begin, end, behind = self.inline
        return message | {"content": f"<think>{begin}{self.reasoning}{end}</think>{behind}{self.answer}"}


@dataclass(frozen=True)
class Talk:
    """A conversation: all but the assistant's turns are messages already."""

    turns: tuple[Message | Said, ...]
    tools: Tools = field(default_factory=list)

    def messages(self, thinking: Thinking) -> list[Message]:
        """As a row has them, or without reasoning."""
        return [turn.message(thinking) if isinstance(turn, Said) else turn for turn in self.turns]


# ---- conversations --------------------------------------------------------------------------------

visible = st.sampled_from([*"aZ7.é中あ😀ß", "e\u0301", "👩‍🔬", "</b>"])
PIECES = [*"abc 019\n\t,.<>\"\\'{}", *"中文字é😀ا\u0301\u200d", "<｜", "<|im", EOS[:7]]
# Never alone in their line, where </think> would end reasoning that a prompt has opened.
TAGS = ["<think>", " </think> "]
spaces = st.none() | st.sampled_from(
    [("", "", ""), ("\n", "\n", "\n\n"), ("\n", "\n", "\n"), (" ", "\n", " ")]
)


def texts(look_alikes: list[str]) -> st.SearchStrategy[str]:
    """Texts with look-alikes, visible at both ends: what templates do to outer spaces differs."""
    inner = st.lists(st.sampled_from(PIECES + look_alikes * 2), max_size=8).map("".join)
    return st.builds("{}{}{}".format, visible, inner, visible)


@st.composite
def _talks(draw: st.DrawFn, text: st.SearchStrategy[str], turn: Any, called: Any, spec: Any) -> Talk:
    system = draw(st.none() | st.just("") | text)
    turns: list[Message | Said] = [] if system is None else [{"role": "system", "content": system}]
    tools = draw(st.just([]) | spec)
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(text)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            turns.append(said := draw(called))
            turns += [{"role": "tool", "content": draw(text)} for _ in said.calls]
        turns.append(draw(turn))
    return Talk(tuple(turns), tools)


@cache
def talks(name: str) -> st.SearchStrategy[Talk]:
    """Several turns, with or without system, tools, calls and reasoning."""
    family = FAMILIES[name]
    marks = [EOS, "<｜User｜>", "<｜tool▁calls▁begin｜>"]
    text = texts([*TAGS, family.end, *family.special, *family.added, *marks])
    # In what the assistant says only ends and beginnings of turns stay text.
    ends = [family.end, *(token for token in family.special if token != "<|eom_id|>")]
    own, reasoning = texts(TAGS + ends), st.just("") | texts(ends)
    arguments = st.dictionaries(own, own | st.integers(), max_size=2)
    calls = st.lists(
        st.tuples(st.sampled_from(["weather", "f_1"]), arguments),
        min_size=1,
        max_size=1 if name == "llama3" else 2,
    ).map(tuple)
    return _talks(
        text,
        st.builds(Said, own, reasoning, spaces),
        st.builds(Said, st.just(""), reasoning, spaces, calls),
        st.builds(_spec, text, text),
    )


def _spec(description: str, argument: str) -> Tools:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    function = {"name": "weather", "description": description, "parameters": parameters}
    return [{"type": "function", "function": function}]


# ---- the rules ------------------------------------------------------------------------------------


def switch(name: str, said: Said, thinking: Thinking) -> dict[str, bool]:
    """What a server sets to have this turn written."""
    on = thinking == "keep" or (thinking == "auto" and bool(said.reasoning))
    return {"thinking": on, "enable_thinking": on} if thinking != "auto" or name == "v3.1" else {}


def expected(name: str, said: Said, thinking: Thinking, prompt: str) -> str:
    """What is trained on of a turn, without the end token."""
    answer = rendered_calls(name, said.message("drop")) if said.calls else said.answer
    reasoning = "" if thinking == "drop" else said.reasoning
    if prompt.endswith("<think>"):
        return f"{reasoning}</think>{answer}"
    if prompt.endswith("<think>\n"):
        return f"{reasoning}\n</think>\n\n{answer}" if reasoning else f"</think>\n\n{answer}"
    if not reasoning:
        return answer
    # R1's and Llama's templates show no content beside calls, so that the reasoning in it is written for them.
    if said.inline is not None and not (said.calls and name in ("r1", "llama3")):
        between = "\n" if name == "qwen2.5" and said.calls else ""
        return str(said.message(thinking)["content"]) + between + (answer if said.calls else "")
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


@pytest.fixture(scope="module")
def servers(tiny_models: dict[str, Path]) -> dict[str, Server]:
    """A server for each family."""
    tokenizers = make_tokenizers(tiny_models)
    return {name: Server(FAMILIES[name], tokenizers[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=NUM_CONVERSATIONS, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), thinking=st.sampled_from(MODES))
def test_training_sees_what_serving_sees(
    servers: dict[str, Server], name: str, data: st.DataObject, thinking: Thinking
) -> None:
    server, talk = servers[name], data.draw(talks(name))
    encoder = server.encoders[thinking]
    encoder.turns.clear()
    row = Talk(talk.turns).messages("keep")
    sequences = encoder.encode(Example(tuple(row), tuple(talk.tools)))
    messages = talk.messages(thinking)
    runs = [run for sequence in sequences for run in supervised(sequence.ids, sequence.weights)]
    answers = [(i, turn) for i, turn in enumerate(talk.turns) if isinstance(turn, Said)]
    assert encoder.turns.total() == len(runs) == len(answers)
    for (context, own), (position, said) in zip(runs, answers, strict=True):
        assert context == server.ids(messages[:position], talk.tools, switch(name, said, thinking))
        prompt = server.tokenizer.decode(context)
        wanted = expected(name, said, thinking, prompt) + server.family.end
        assert server.tokenizer.decode(own) == server.normalized(wanted)
    if name in ("v3", "qwen2.5", "llama3") and not any(said.reasoning for _, said in answers):
        assert len(sequences) == 1


def supervised(ids: list[int], weights: list[float]) -> list[tuple[list[int], list[int]]]:
    """(all ids before it, its own ids) of every unbroken supervised stretch."""
    runs, start = [], 0
    for weight, group in groupby(weights):
        end = start + len(list(group))
        if weight:
            assert weight == 1
            runs.append((ids[:start], ids[start:end]))
        start = end
    return runs
