"""Greedy answers to prompts of token ids, batched.

Axes: B = prompts, T = tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ds.data.thinking import CLOSE

_FILLER = 0
"""Stands where the mask hides it."""


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether its longest permitted length ended it."""

    text: str
    is_cut_off: bool


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    ends: Collection[int],
    limits: Sequence[int],
) -> list[Answer]:
    """The likeliest token each time.

    Args:
        model: a transformers or peft model in evaluation mode.
        tokenizer: decodes.
        prompts: token ids.
        ends: each of these tokens ends an answer, beside those of the model's own generation config.
        limits: tokens of the longest answer to each prompt.
    """
    ends = sorted({*ends, *_own_ends(model)})
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), _FILLER)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):  # on the left, so that every answer starts where its row ends
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    output_BT = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
        max_new_tokens=max(limits),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else _FILLER,
    )
    written = output_BT[:, longest:].tolist()
    return [_answer(tokenizer, ids[:limit], ends) for ids, limit in zip(written, limits, strict=True)]


def _own_ends(model: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    return [] if own is None else own if isinstance(own, list) else [own]


def _answer(tokenizer: Any, ids: list[int], ends: Sequence[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return Answer(without_reasoning(text).strip(), is_cut_off=end is None)


def without_reasoning(text: str) -> str:
    """What stands behind the end of a reasoning, if there is one."""
    return text.rpartition(CLOSE)[2]
