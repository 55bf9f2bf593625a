"""Whether a merged model answers as its base model with the adapter does: the logits of both on real text."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from raytune_ds.before import comes_back
from raytune_ds.modelfiles import ExportError
from raytune_ds.world import World

MAX_DOCUMENTS, MAX_TOKENS = 4, 128
# Logits of a position may differ by this share of their spread. A rounded weight is off by up to half a unit in its
# last place: 0.2 % in bfloat16, 0.02 % in float16; errors of all layers add up, as the root of their number if they
# are as good as random, and twice where activations are rounded too. float32 differs by the order of sums alone.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# However little an adapter does, a merge that loses half of it is wrong; but below this part of the tolerance nothing
# can be told from rounding.
_FLOOR = 0.2
# The smallest difference may send a token to other experts, and then its logits differ for good: in bfloat16 that was
# one token in nine of a tiny model. What is merged wrongly shows in all of them.
_SHARE_WITH_EXPERTS = 0.75


@dataclass(frozen=True)
class Closeness:
    """How near two models are.

    Attributes:
        num_tokens: positions compared.
        dtype: what was computed in.
        largest: difference of two logits.
        difference: of the logits of a position, as a share of their spread; the median of all positions.
        effect: what the adapter changes, measured likewise.
        same: share of positions at which both find the same token likeliest.
        limit: for the difference of a position.
        within: share of positions below it.
        required: that share has to be at least this.
    """

    num_tokens: int
    dtype: str
    largest: float
    difference: float
    effect: float
    same: float
    limit: float
    within: float
    required: float

    @property
    def is_good(self) -> bool:
        """Whether the merged model may pass for the other one."""
        return self.within >= self.required

    def __str__(self) -> str:
        return (
            f"on {self.num_tokens} tokens in {self.dtype}: logits differ by {self.difference:.2g} of their spread "
            f"(the adapter moves them by {self.effect:.2g}), at most by {self.largest:.2g}; "
            f"the likeliest token is the same for {100 * self.same:.1f} %"
        )


def compare(
    merged: Path,
    tuned: Callable[..., Any],
    files_dtype: torch.dtype,
    num_bytes: int,
    documents: Sequence[Sequence[int]],
    trust_remote_code: bool,
    dtype: torch.dtype | None = None,
) -> Closeness:
    """Runs one model after the other, so that only one is in memory.

    Args:
        merged: the directory of the merged model.
        tuned: loads the base model with the adapter, to compute in a dtype; without it where `adapted` is False.
        files_dtype: of most of the merged model's weights.
        num_bytes: of all of them.
        documents: token ids; the first few of each are used.
        trust_remote_code: whether the model's own Python may run.
        dtype: to compute in; None: float32 where there is room for it, or as the files.

    Raises:
        ExportError: they differ by more than rounding explains.
    """
    cut = [list(ids)[:MAX_TOKENS] for ids in documents[:MAX_DOCUMENTS]]
    dtype = dtype or _dtype_to_compute_in(files_dtype, num_bytes)
    model = tuned(dtype).eval()
    expected_TV = _logits(model, cut)
    switches_off = comes_back(model.active_peft_config)
    if switches_off:
        with model.disable_adapter():
            base_TV = _logits(model, cut)
    del model
    gc.collect()
    if not switches_off:
        base_TV = _logits(tuned(dtype, adapted=False).eval(), cut)
        gc.collect()
    model = load(merged, dtype, trust_remote_code)
    found_TV = _logits(model, cut)
    has_experts = any(parameter.ndim == 3 for parameter in model.parameters())
    del model
    closeness = closeness_of(found_TV, expected_TV, base_TV, files_dtype, dtype, has_experts)
    if not closeness.is_good:
        raise ExportError(
            f"the merged model does not answer as the base model with the adapter does: {closeness}. "
            f"{100 * closeness.within:.0f} % of the tokens are within {closeness.limit:.2g}, and "
            f"{100 * closeness.required:.0f} % have to be"
        )
    return closeness


def load(folder: str | Path, dtype: torch.dtype, trust_remote_code: bool, **how: Any) -> Any:
    """A model as plain transformers loads it: on the GPUs where there are some.

    Args:
        folder: a model directory, or the name of a model of the hub.
        dtype: to compute in.
        trust_remote_code: whether the model's own Python may run.
        how: further arguments of from_pretrained.
    """
    if torch.cuda.is_available():
        how["device_map"] = "auto"
    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, trust_remote_code=trust_remote_code, **how
    ).eval()


def closeness_of(
    found_TV: torch.Tensor,
    expected_TV: torch.Tensor,
    base_TV: torch.Tensor,
    files_dtype: torch.dtype,
    dtype: torch.dtype,
    has_experts: bool,
) -> Closeness:
    """Compares logits of the same tokens.

    Args:
        found_TV: of the merged model.
        expected_TV: of the base model with the adapter.
        base_TV: of the base model without it.
        files_dtype: which the merged weights are rounded to.
        dtype: which was computed in.
        has_experts: whether a router chooses among experts.
    """
    spread_T = expected_TV.std(-1)
    difference_T = (found_TV - expected_TV).square().mean(-1).sqrt() / spread_T
    effect = ((base_TV - expected_TV).square().mean(-1).sqrt() / spread_T).median().item()
    tolerance = max(TOLERANCES[files_dtype], TOLERANCES[dtype])
    limit = max(_FLOOR * tolerance, min(tolerance, effect / 2))
    return Closeness(
        num_tokens=len(found_TV),
        dtype=str(dtype).removeprefix("torch."),
        largest=(found_TV - expected_TV).abs().max().item(),
        difference=difference_T.median().item(),
        effect=effect,
        same=(found_TV.argmax(-1) == expected_TV.argmax(-1)).float().mean().item(),
        limit=limit,
        within=(difference_T <= limit).float().mean().item(),
        required=_SHARE_WITH_EXPERTS if has_experts else 1.0,
    )


@torch.inference_mode()
def _logits(model: Any, documents: Sequence[Sequence[int]]) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    found = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in documents]
    return torch.cat(found)


def _dtype_to_compute_in(files: torch.dtype, num_bytes: int) -> torch.dtype:
    """float32 where there is room for it twice over: then nothing differs but what is in the files."""
    in_float32 = num_bytes * 4 // files.itemsize
    return torch.float32 if 2 * in_float32 < World.alone().least_memory() else files
