"""Answers of a batch, token by token: each row ends for a reason of its own, and is read as text while it grows.

The decoding is `generate` of transformers, with one stopping criterion that asks every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from raytune_ds.sampling import RowSampler, Sampling

Finish = Literal["stop", "length", "cancelled"]
"""The model or a stop text ended it; it is as long as it may be; nobody wants it any more."""


class Answer:
    """An answer while it is written.

    Attributes:
        prompt: token ids of what is answered.
        ids: token ids of the answer so far, the end token included.
        ends: the end tokens.
        finish: why it ended; None while it has not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        sampling: Sampling,
        ends: frozenset[int],
        generator: torch.Generator,
        write: Callable[[str], None] | None = None,
        with_special: bool = False,
    ) -> None:
        """`ends` are the end tokens; `write` is given the text piece by piece, special tokens only `with_special`."""
        self.prompt, self.sampling, self.generator = list(prompt), sampling, generator
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._tokenizer, self.ends, self._write = tokenizer, ends, write
        self._skip = not with_special
        # A tokenizer without a fast one inside decodes all of the answer again for each token.
        self._stream = DecodeStream([], skip_special_tokens=self._skip) if tokenizer.is_fast else None
        self._decoded = ""
        self._shown = 0
        self._end_of_text: int | None = None

    @property
    def text(self) -> str:
        """What is sure to be part of the answer, without its end token."""
        return self._decoded[: self._shown]

    def take(self, token: int) -> None:
        """The next token, unless the answer has ended."""
        if self.finish is not None:
            return
        self.ids.append(token)
        if token in self.ends:
            self.end("stop")
            return
        self._read(token)
        if self._find_stop():
            self.end("stop")
        elif len(self.ids) == self.sampling.max_new_tokens:
            self.end("length")
        else:
            self._show(len(self._decoded) - self._held_back())

    def end(self, why: Finish) -> None:
        """Ends it, with all of its text shown."""
        if self.finish is not None:
            return
        if self._end_of_text is None:
            # What the stream holds back of a character that never became whole.
            whole = self._whole()
            self._decoded = whole if whole.startswith(self._decoded) else self._decoded
            self._find_stop()
        self._show(len(self._decoded) if self._end_of_text is None else self._end_of_text)
        self.finish = why

    def _read(self, token: int) -> None:
        if self._stream is not None:
            self._decoded += self._stream.step(self._tokenizer._tokenizer, token) or ""
        elif not (whole := self._whole()).endswith("\ufffd"):  # half a character
            self._decoded = whole

    def _whole(self) -> str:
        said = self.ids[:-1] if self.ids and self.ids[-1] in self.ends else self.ids
        return str(self._tokenizer.decode(said, skip_special_tokens=self._skip))

    def _find_stop(self) -> bool:
        """Whether a stop text has come; what comes first counts."""
        longest = max((len(text) for text in self.sampling.stop), default=0)
        start = max(0, self._shown - longest)
        found = [at for text in self.sampling.stop if (at := self._decoded.find(text, start)) >= 0]
        self._end_of_text = min(found, default=None)
        return bool(found)

    def _held_back(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        return max(
            (
                length
                for text in self.sampling.stop
                for length in range(1, len(text))
                if self._decoded.endswith(text[:length])
            ),
            default=0,
        )

    def _show(self, up_to: int) -> None:
        if up_to > self._shown:
            piece, self._shown = self._decoded[self._shown : up_to], up_to
            if self._write:
                self._write(piece)


@torch.inference_mode()
def decode(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    pause: Callable[[], bool] = lambda: False,
) -> None:
    """Writes the answers, all of them as one batch, until each has ended.

    Args:
        model: a transformers or peft model in evaluation mode.
        tokenizer: gives the token to pad with.
        answers: of prompts of any lengths. One that was paused goes on where it was.
        pause: asked behind every token whether to return although answers are unfinished.
    """
    begun = [[*answer.prompt, *answer.ids] for answer in answers]
    longest = max(map(len, begun))
    pad = _padding(tokenizer)
    # On the left, so that every answer goes on where its row of the batch ends.
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in begun])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in begun])
    rows = [(a.sampling, a.generator, longest - len(ids)) for a, ids in zip(answers, begun, strict=True)]
    ends = sorted({end for answer in answers for end in answer.ends})
    model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        # Nothing of the model's own generation config, which would be taken for what is left out here.
        generation_config=GenerationConfig(
            max_new_tokens=max(a.sampling.max_new_tokens - len(a.ids) for a in answers),
            do_sample=False,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=ends or None,
            pad_token_id=pad,
        ),
        logits_processor=LogitsProcessorList([RowSampler(rows)]),
        stopping_criteria=StoppingCriteriaList([_EachRow(answers, pause)]),
    )


@torch.inference_mode()
def ignores_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model answers the same with padding in front, which is tried.

    Attention that compresses several tokens into one, as DeepSeek-V4's, does not: padding falls in with what is read.
    """
    pad = _padding(tokenizer)
    read = [token for token in range(3 * _TRIED) if token != pad][-_TRIED:]
    ids_BT = torch.tensor([[pad] * _TRIED + read], device=model.device)
    mask_BT = torch.tensor([[0] * _TRIED + [1] * _TRIED], device=model.device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    padded_V = (
        model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits[0, -1].float()
    )
    alone_V = model(input_ids=ids_BT[:, _TRIED:]).logits[0, -1].float()
    return bool((padded_V - alone_V).abs().max() < 0.1 * alone_V.std())


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; any will do where there is none, as the mask hides it."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


_TRIED = 9
"""Tokens read, and of padding; no number by which attention is likely to cut."""


class _EachRow(StoppingCriteria):
    """Gives every answer its token; rows end as their answers do."""

    def __init__(self, answers: Sequence[Answer], pause: Callable[[], bool]) -> None:
        self._answers, self._pause, self._paused = answers, pause, False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if not self._paused:  # where `generate` looks a token late, there is one more than was asked for
            for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
                answer.take(token)
            self._paused = self._pause()
        ended = [self._paused or answer.finish is not None for answer in self._answers]
        return torch.tensor(ended, device=input_ids.device)
