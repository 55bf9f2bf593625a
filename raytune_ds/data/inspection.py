"""What is odd about one row, its text beside the tokens it became."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from ftfy.badness import is_bad

from raytune_ds.data.formats import Example, Message
from raytune_ds.data.sketch import code_points, main_script, scripts_in
from raytune_ds.data.template import Encoded, Encoder
from raytune_ds.data.thinking import CLOSE, OPEN, part

REPLACEMENT = "\ufffd"


def told(example: Example) -> str:
    """What people and model say in a row; not the system prompt and the tools, which many rows share."""
    if example.text is not None:
        return example.text
    parts = [said(message) for message in example.messages if message["role"] != "system"]
    if example.rejected is not None:
        parts.append(said(example.rejected.messages[-1]))
    return "\n".join(parts)


def exactly(example: Example) -> str:
    """All that makes a row what it is, so that only equal rows give equal texts."""
    other = example.rejected.messages if example.rejected is not None else ()
    parts = (example.text, example.messages, example.tools, other, example.desirable, sorted(example.silent))
    return json.dumps(parts, ensure_ascii=False)


def said(message: Message) -> str:
    """A message's text, the calls of tools included."""
    calls = [f"{call['function']}" for call in message.get("tool_calls") or ()]
    return "\n".join([message.get("content") or "", *calls])


class Inspector:
    """Looks at the rows of one tokenizer."""

    def __init__(self, encoder: Encoder) -> None:
        """`encoder` is what encodes them."""
        self._encoder, self._tokenizer = encoder, encoder.tokenizer
        special = {i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        self._special = special | set(self._tokenizer.all_special_ids)
        self._bos = self._tokenizer.bos_token_id

    def oddities(self, example: Example, sequences: Sequence[Encoded], text: str) -> Iterator[str]:
        """What is odd about a row, as kinds of findings; `text` is what `told` gives of it."""
        if REPLACEMENT in text or (_may_be_damaged(text) and is_bad(text)):
            yield "damaged-text"
        if any(self._bos is not None and s.ids[:2] == [self._bos] * 2 for s in sequences):
            yield "double-bos"
        if example.text is None:
            yield from self._of_conversation(example, sequences)
            return
        yield f"writing:{main_script(scripts_in(text))}"
        if any(not self._special.isdisjoint(s.ids[1:-1]) for s in sequences):
            yield "control-token"

    def _of_conversation(self, example: Example, sequences: Sequence[Encoded]) -> Iterator[str]:
        if any(s.num_supervised == len(s.ids) - 1 for s in sequences):
            yield "all-supervised"
        if any(s.has_literals for s in sequences):
            yield "control-text"
        answers = [run for s in sequences for run in _runs(s)]
        if any(run[-1] not in self._special for run in answers):
            yield "no-end-token"
        yield from self._of_answers(example, sequences, answers)
        asked, answered = (
            scripts_in("".join(_contents(example.messages, role))) for role in ("user", "assistant")
        )
        yield f"writing:{main_script(asked + answered)}"
        scripts = {main_script(counts) for counts in (asked, answered)} - {""}
        if len(scripts) > 1:
            yield "answer-in-other-writing"

    def _of_answers(
        self, example: Example, sequences: Sequence[Encoded], answers: list[list[int]]
    ) -> Iterator[str]:
        messages = [m for m in example.messages if m["role"] == "assistant"]
        contents = [str(m.get("content") or "") for m in messages]
        if any(content.count(OPEN) != content.count(CLOSE) for content in contents):
            yield "reasoning-unbalanced"
        supervised = "".join(self._encoder.literals.text(run) for run in answers)
        # Of an answer in several steps that is judged, the last ones may be all that is kept.
        kept = len(list(_runs(sequences[0]))) if is_judged(example) else None
        trained = self._encoder.trained_messages(example)
        parted = [part(message) for message in (trained if kept is None else trained[-kept:])]
        # Beside a call templates may leave out what is said.
        told_apart = [one for one in parted if not one.bare.get("tool_calls")]
        if any(str(one.bare["content"]).strip() not in supervised for one in told_apart):
            yield "answer-changed"
        if self._encoder.thinking != "drop" and any(one.reasoning not in supervised for one in parted):
            yield "reasoning-lost"


def _may_be_damaged(text: str) -> bool:
    """Whether there are letters of the Latin supplement, without which no text is damaged; most have none."""
    if text.isascii():
        return False
    characters = code_points(text)
    return bool(((characters >= 0x80) & (characters <= 0x17F)).any())


def is_judged(example: Example) -> bool:
    """Whether it is a pair, or has a label."""
    return example.rejected is not None or example.desirable is not None


def _runs(sequence: Encoded) -> Iterator[list[int]]:
    """The ids of each stretch that is trained on."""
    weights, end = [*sequence.weights, 0.0], 0
    while 1.0 in weights[end:]:
        start = weights.index(1.0, end)
        end = weights.index(0.0, start)
        yield sequence.ids[start:end]


def _contents(messages: Sequence[Message], role: str) -> list[str]:
    return [str(m.get("content") or "") for m in messages if m["role"] == role]
