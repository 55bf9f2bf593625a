"""Greedy answers to prompts of token ids, batched.

Axes: B = prompts, T = tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ds.data.thinking import CLOSE
from raytune_ds.model.load import attends_causally

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
    found: dict[int, Answer] = {}
    for group in _groups(model, prompts):
        chosen, most = [prompts[row] for row in group], [limits[row] for row in group]
        written = _generated(model, chosen, ends, max(most))
        for row, ids, limit in zip(group, written, most, strict=True):
            found[row] = _answer(tokenizer, ids[:limit], ends)
    return [found[row] for row in range(len(prompts))]


def _groups(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The rows that can be answered together: all of them, or those of one length.

    Attention that is more than causal may not ignore padding: DeepSeek-V4's compresses it together with what is read.
    """
    if attends_causally(model.config):
        return [list(range(len(prompts)))]
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    return list(groups.values())


def _generated(
    model: Any, prompts: Sequence[list[int]], ends: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """What is written behind each prompt, end tokens and all."""
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
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else _FILLER,
    )
    return list(output_BT[:, longest:].tolist())


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
