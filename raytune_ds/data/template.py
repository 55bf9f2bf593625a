"""One `Example` to token ids and loss weights, together, in one pass.

The contract: what stands before a supervised turn is, token for token, what the model will see when served, that is
`apply_chat_template(messages before it, add_generation_prompt=True)`, with the template's switch of thinking where it
has one; supervised are the turn itself and its end token, its reasoning as the prompt wants it (`thinking`).
Where the template keeps that property over a conversation its turns share one sequence. Where it does not (R1's drops
the reasoning of earlier turns and opens `<think>` itself) a new sequence starts. Which of the two holds is found by
comparing token ids, never by the model's name. What looks like a control token in a content is text (`literal`).

An answer that is judged, one of a pair or one with a label, is always one sequence, of which its probability can be
taken. Where the template starts a new one within it (several steps with tool calls between, under a template like
R1's), the last sequence stands for the answer, and its earlier steps are not trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from raytune_ds.data.chat import ChatTemplate
from raytune_ds.data.formats import Example, Message, RowError
from raytune_ds.data.labels import Label
from raytune_ds.data.literal import Literals, has_literals
from raytune_ds.data.plainanswers import PlainAnswers
from raytune_ds.data.thinking import (
    BARRED,
    CLOSE,
    DROPPED,
    ENDED,
    KEPT,
    NONE,
    Thinking,
    begins_empty,
    has_closed,
    opener,
    part,
    without_tags,
    written,
)
from raytune_ds.data.turntokens import RenderedTurn, TurnTokens


@dataclass
class Encoded:
    """One training sequence: a weight of 1 for each token that is trained on as a target, else 0."""

    ids: list[int]
    weights: list[float]
    label: Label = Label.PLAIN
    has_literals: bool = False
    """Whether there was text that looks like control tokens and stayed text."""

    @property
    def num_supervised(self) -> int:
        """Targets trained on; the first token of a sequence is never a target."""
        return len(self.weights) - self.weights.count(0.0) - (self.weights[:1] == [1.0])

    def part(self, start: int, stop: int) -> Encoded:
        """Its tokens from `start` up to `stop`."""
        return replace(self, ids=self.ids[start:stop], weights=self.weights[start:stop])


class Encoder:
    """Renders and tokenizes examples for one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        last_turn_only: bool = False,
        thinking: Thinking = "auto",
        num_chars: int = 0,
    ) -> None:
        """`tokenizer` carries the chat template; with `last_turn_only` earlier answers are context.

        `thinking` is what data.thinking says: keep, drop or auto. About `num_chars` characters are to come.
        """
        self.tokenizer, self.thinking, self._last_turn_only = tokenizer, thinking, last_turn_only
        self.literals, self._template = Literals(tokenizer, num_chars), ChatTemplate(tokenizer)
        self._plain, self._tokens = PlainAnswers(self._template), TurnTokens(self.literals)
        self.turns: Counter[str] = Counter()
        """Answers of the conversations encoded so far, by what became of their reasoning (`thinking`)."""

    def encode(self, example: Example) -> list[Encoded]:
        """All training sequences of one example; of a pair they are two, the chosen one and the rejected one.

        Raises:
            RowError: the chat template refuses the conversation, or renders both answers of a pair alike.
        """
        (encoded,) = self.encode_all([example])
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def encode_all(self, examples: Sequence[Example]) -> list[list[Encoded] | RowError]:
        """What `encode` gives for each of several examples, or why it can't, tokenized together: half the work."""
        rendered = [self._rendered(example) for example in examples]
        conversations = [turns for sides in rendered if not isinstance(sides, RowError) for turns in sides]
        tokens = self._tokens.of(conversations)
        texts = iter(self.literals.document_ids([e.text for e in examples if e.text is not None]))
        return [
            [self._document(next(texts))]
            if example.text is not None
            else self._encoded(example, sides, tokens)
            for example, sides in zip(examples, rendered, strict=True)
        ]

    def _rendered(self, example: Example) -> list[list[RenderedTurn]] | RowError:
        """The turns of a conversation, or of both of a pair."""
        sides = [example, example.rejected] if example.rejected is not None else [example]
        # Both answers of a pair are to the same prompt, so one that reasons has the other asked in thinking mode too.
        thinks = None if len(sides) == 1 else any(part(s.messages[-1]).reasoning for s in sides)
        try:
            return [
                list(self._turns(self.literals.guarded(side), thinks)) for side in sides if side.text is None
            ]
        except RowError as error:
            return error

    def _encoded(
        self, example: Example, sides: list[list[RenderedTurn]] | RowError, tokens: Mapping[str, list[int]]
    ) -> list[Encoded] | RowError:
        if isinstance(sides, RowError):
            return sides
        self.turns.update(turn.fate for turns in sides for turn in turns)
        sequences = [self._sequences(turns, tokens) for turns in sides]
        if example.rejected is not None:
            chosen, rejected = (one[-1] for one in sequences)
            if chosen.ids == rejected.ids:
                return RowError("the chat template makes the same of its chosen and its rejected answer")
            return [replace(chosen, label=Label.CHOSEN), replace(rejected, label=Label.REJECTED)]
        if example.desirable is not None:
            label = Label.DESIRABLE if example.desirable else Label.UNDESIRABLE
            return [replace(sequences[0][-1], label=label)]
        return sequences[0]

    def _sequences(self, turns: list[RenderedTurn], tokens: Mapping[str, list[int]]) -> list[Encoded]:
        sequences: list[Encoded] = []
        for before, turn in zip([None, *turns], turns, strict=False):
            behind = self._tokens.behind(before, turn, tokens) if before is not None else None
            if behind is None:
                sequences.append(Encoded([], []))
                behind = self._tokens.context_ids(turn, tokens)
            sequences[-1].has_literals |= has_literals(turn.whole)
            answer = tokens[turn.answer]
            sequences[-1].ids.extend([*behind, *answer])
            sequences[-1].weights.extend([0.0] * len(behind) + [1.0] * len(answer))
        return sequences

    def _document(self, ids: list[int]) -> Encoded:
        """One document, BOS and EOS around it as far as the tokenizer has them: every token is trained on.

        Whether a tokenizer adds BOS by itself says little: transformers 5 ignores `add_bos_token` in the presence of a
        tokenizer.json. A model that has one has seen it in front of everything.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return Encoded(ids, [1.0] * len(ids))

    def trained_messages(self, example: Example) -> list[Message]:
        """The assistant's messages that are trained on."""
        return [example.messages[position] for position in self._trained(example)]

    def _trained(self, example: Example) -> list[int]:
        answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        trained = [i for i in answers if i not in example.silent]
        return trained[-1:] if self._last_turn_only else trained

    def _turns(self, example: Example, thinks: bool | None = None) -> Iterator[RenderedTurn]:
        """Each turn that is trained on; `thinks` says for all of them whether `auto` is thinking mode."""
        messages = list(example.messages)
        if self.thinking == "drop":
            messages = [part(m).bare if m["role"] == "assistant" else m for m in messages]
        positions = self._trained(example)
        modes = {position: self._is_thinking(example.messages[position], thinks) for position in positions}
        prompts = self._prompts(messages, example.tools, modes)
        for position in positions:
            yield self._turn(prompts[position], example.messages[position], modes[position])

    def _is_thinking(self, message: Message, thinks: bool | None) -> bool:
        if self.thinking != "auto":
            return self.thinking == "keep"
        return bool(part(message).reasoning) if thinks is None else thinks

    def _prompts(
        self, messages: list[Message], tools: Sequence[dict[str, Any]], modes: Mapping[int, bool]
    ) -> dict[int, _Prompt]:
        """By position, what is seen before that message is said in thinking mode, or in the other one."""
        prompts = {}
        for thinking in set(modes.values()):
            positions = [position for position, mode in modes.items() if mode == thinking]
            switch = None if self.thinking == "auto" and not self._template.has_switch else thinking
            texts = self._template.prompts(messages, positions, tools, switch)
            for position, text in zip(positions, texts, strict=True):
                prompts[position] = _Prompt(messages[:position], tools, switch, text)
        return prompts

    def _turn(self, prompt: _Prompt, message: Message, thinking: bool) -> RenderedTurn:
        reasoning, bare = part(message)
        barred = has_closed(prompt.text) and not (reasoning and self.thinking == "keep")
        left_out = barred or self.thinking == "drop"
        if left_out and bare is not message:
            if not bare["content"].strip() and not bare.get("tool_calls"):
                raise RowError("nothing is left of one of its answers without its reasoning")
            message = bare
        answer = self._answer(prompt, message, "" if left_out else reasoning)
        if reasoning:
            fate = DROPPED if self.thinking == "drop" else BARRED if barred else KEPT
        else:
            fate = ENDED if begins_empty(answer) else NONE
        mode = " in thinking mode" if thinking else " in non-thinking mode"
        return RenderedTurn(prompt.text, answer, fate + mode * self._template.has_switch)

    def _answer(self, prompt: _Prompt, message: Message, reasoning: str) -> str:
        """The supervised text of a turn: as the template renders it if it keeps it whole, else written here.

        Raises:
            RowError: it calls a tool, and the template does not render that.
        """
        opened, bare = opener(prompt.text), part(message).bare
        if not opened and not reasoning:
            plain = self._plain.written(prompt.text, prompt.messages, message, prompt.tools, prompt.switch)
            if plain is not None:
                return plain
        finished = self._finished(prompt, message)
        rendered, end = self._template.said(prompt.text, finished)
        if _holds(rendered, bare, reasoning, opened):
            return rendered
        if not opened and not reasoning:
            return _plain(message) + end
        # What the template makes of the answer alone, behind all of the prompt but the `<think>` it ends with.
        if bare is not message:
            finished = self._finished(prompt, bare)
        rendered, end = self._template.said(prompt.text.removesuffix(opened), finished)
        alone = (text for text in (without_tags(rendered), rendered) if _holds(text, bare))
        return written(reasoning, opened) + (next(alone, None) or _plain(bare) + end).lstrip()

    def _finished(self, prompt: _Prompt, message: Message) -> str:
        return self._template.render(
            [*prompt.messages, message], prompt.tools, generate=False, thinking=prompt.switch
        )


class _Prompt(NamedTuple):
    """What is seen when serving, and what it was rendered from."""

    messages: list[Message]
    tools: Sequence[dict[str, Any]]
    switch: bool | None
    text: str


def _holds(rendered: str, bare: Message, reasoning: str = "", opened: str = "") -> bool:
    """Whether a rendered turn has its reasoning, the end of what the prompt has opened, and its answer, in this order.

    Beside a tool call templates may leave a content out; it could not be told when serving either.
    """
    content, names = (bare.get("content") or "").strip(), _called(bare)
    head, found, rest = rendered.partition(reasoning) if reasoning else ("", "found", rendered)
    if any(name in head for name in names):  # what was found is part of a call
        return False
    if names:
        talk = content if content in rest else ""
        called = all(rest.count(name) > talk.count(name) for name in names)
        at = min(map(rest.find, names)) if called else -1
    else:
        at = rest.find(content)
    return bool(rendered and found) and at >= 0 and (not opened or CLOSE in rest[:at])


def _plain(message: Message) -> str:
    """What a message says.

    Raises:
        RowError: it calls a tool.
    """
    if _called(message):
        raise RowError(
            "the chat template leaves out its tool call, so nothing could be learned from the turn"
        )
    return message.get("content") or ""


def _called(message: Message) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls") or ()]


def coloured(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The sequence as text, what is trained on in green."""
    text = Text()
    for supervised, piece in _pieces(encoded, tokenizer):
        text.append(piece, style="bold green" if supervised else "dim")
    return text


def marked(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The sequence as text, what is trained on between « and », for where there are no colours."""
    return "".join(f"«{piece}»" if supervised else piece for supervised, piece in _pieces(encoded, tokenizer))


def _pieces(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """Runs of tokens that are all trained on, or all not."""
    tokens = zip(encoded.ids, encoded.weights, strict=True)
    for supervised, run in groupby(tokens, key=lambda token: token[1] != 0):
        yield supervised, str(tokenizer.decode([token for token, _ in run]))
