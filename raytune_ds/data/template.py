"""One `Example` to token ids and loss weights, together, in one pass.

The contract: what stands before a supervised turn is, token for token, what the model will see when served, that is
`apply_chat_template(messages before it, add_generation_prompt=True)`; supervised are the turn itself and its end token.
Where the template keeps that property over a conversation its turns share one sequence. Where it does not (R1's drops
the reasoning of earlier turns and opens `<think>` itself) a new sequence starts. Which of the two holds is found by
comparing token ids, never by the model's name. What looks like a control token in a content is text (`literal`).

An answer that is judged, one of a pair or one with a label, is always one sequence, of which its probability can be
taken. Where the template starts a new one within it (several steps with tool calls between, under a template like
R1's), the last sequence stands for the answer, and its earlier steps are not trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from raytune_ds.data.formats import Example, RowError
from raytune_ds.data.labels import Label
from raytune_ds.data.literal import Literals

_OPENED_THINKING = re.compile(r"<think>\s*\Z")


@dataclass
class Encoded:
    """One training sequence: a weight of 1 for each token that is trained on as a target, else 0."""

    ids: list[int]
    weights: list[float]
    label: Label = Label.PLAIN

    @property
    def num_supervised(self) -> int:
        """Targets trained on; the first token of a sequence is never a target."""
        return sum(weight != 0 for weight in self.weights[1:])

    def part(self, start: int, stop: int) -> Encoded:
        """Its tokens from `start` up to `stop`."""
        return Encoded(self.ids[start:stop], self.weights[start:stop], self.label)


class Encoder:
    """Renders and tokenizes examples for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, last_turn_only: bool = False) -> None:
        """`tokenizer` carries the chat template; with `last_turn_only` earlier answers are context."""
        self.tokenizer, self._last_turn_only = tokenizer, last_turn_only
        self.literals = Literals(tokenizer)

    def encode(self, example: Example) -> list[Encoded]:
        """All training sequences of one example; of a pair they are two, the chosen one and the rejected one.

        Raises:
            RowError: the chat template refuses the conversation, or renders both answers of a pair alike.
        """
        if example.text is not None:
            return [self._encode_text(example.text)]
        if example.rejected is not None:
            return self._encode_pair(example, example.rejected)
        if example.desirable is not None:
            return [self._judged(example, Label.DESIRABLE if example.desirable else Label.UNDESIRABLE)]
        return self._sequences(example)

    def _encode_pair(self, chosen: Example, rejected: Example) -> list[Encoded]:
        pair = [self._judged(chosen, Label.CHOSEN), self._judged(rejected, Label.REJECTED)]
        if pair[0].ids == pair[1].ids:
            raise RowError("the chat template makes the same of its chosen and its rejected answer")
        return pair

    def _judged(self, example: Example, label: Label) -> Encoded:
        return replace(self._sequences(example)[-1], label=label)

    def _sequences(self, example: Example) -> list[Encoded]:
        sequences: list[Encoded] = []
        for context, answer in self._turns(self.literals.guarded(example)):
            context_ids, answer_ids = self.literals.ids(context), self.literals.ids(answer)
            last = sequences[-1] if sequences else None
            if last is not None and context_ids[: len(last.ids)] == last.ids:
                between = context_ids[len(last.ids) :]
                last.ids.extend(between + answer_ids)
                last.weights.extend([0.0] * len(between) + [1.0] * len(answer_ids))
            else:
                weights = [0.0] * len(context_ids) + [1.0] * len(answer_ids)
                sequences.append(Encoded(context_ids + answer_ids, weights))
        return sequences

    def _encode_text(self, text: str) -> Encoded:
        """One document, BOS and EOS around it as far as the tokenizer has them: every token is trained on.

        Whether a tokenizer adds BOS by itself says little: transformers 5 ignores `add_bos_token` in the presence of a
        tokenizer.json. A model that has one has seen it in front of everything.
        """
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return Encoded(ids, [1.0] * len(ids))

    def trained_messages(self, example: Example) -> list[dict[str, Any]]:
        """The assistant's messages that are trained on."""
        return [example.messages[position] for position in self._trained(example)]

    def _trained(self, example: Example) -> list[int]:
        answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        trained = [i for i in answers if i not in example.silent]
        return trained[-1:] if self._last_turn_only else trained

    def _turns(self, example: Example) -> Iterator[tuple[str, str]]:
        """(what is seen when serving, what is to be answered) of each turn that is trained on."""
        for position in self._trained(example):
            context = self.render(example.messages[:position], example.tools, generate=True)
            finished = self.render(example.messages[: position + 1], example.tools, generate=False)
            yield context, self._answer(example.messages[position], context, finished)

    def _answer(self, message: dict[str, Any], context: str, finished: str) -> str:
        """The supervised text of a turn: as the template renders it if it keeps it whole, else the turn itself.

        Raises:
            RowError: it calls a tool, and the template does not render that.
        """
        content = message.get("content") or ""
        rendered = finished[len(context) :] if finished.startswith(context) else ""
        calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        if not all(name in rendered for name in calls):
            raise RowError(
                "the chat template leaves out its tool call, so nothing could be learned from the turn"
            )
        ends = list(self._special_token.finditer(rendered))
        # Behind the end token templates put separators, which belong to the next turn's context.
        ended = bool(ends) and not rendered[ends[-1].end() :].strip()
        end = ends[-1].group() if ended else self.tokenizer.eos_token or ""
        if rendered and content.strip() in rendered:
            return rendered[: ends[-1].end()] if ended else rendered + end
        if (reasoning := message.get("reasoning_content")) and "</think>" not in content:
            content = f"<think>\n{reasoning}\n</think>\n\n{content}"
        if _OPENED_THINKING.search(context):
            content = content.lstrip().removeprefix("<think>").lstrip("\n")
        return content + end

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], generate: bool
    ) -> str:
        """The conversation as text by the tokenizer's chat template.

        Raises:
            RowError: the template refuses it (roles that do not alternate, a role it does not know ...).
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=generate, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        return str(text)

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens.update(self.tokenizer.all_special_tokens)
        return re.compile(
            "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"
        )


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
