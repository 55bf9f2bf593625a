"""A base model with its adapter, loaded as people load it, to hold a merged model against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.config import ModelConfig
from raytune_ds.logits import load
from raytune_ds.merge import device_here
from raytune_ds.model.load import compute_dtype, hold_in, load_config, load_for_generation, skeleton
from raytune_ds.model.weights import fill_buffers, locate, open_weights
from raytune_ds.wrapped import ADAPTER_FILE, load_adapter, put_on, resize, vocabulary


def load_tuned(
    model: ModelConfig, revision: str | None, adapter: Path, dtype: torch.dtype, adapted: bool = True
) -> Any:
    """The model in memory.

    Args:
        model: the base model; quantised as it was in training.
        revision: the commit of a base model of the hub.
        adapter: a peft directory.
        dtype: to compute in.
        adapted: False leaves the adapter away; the vocabulary is the same.
    """
    if model.quantization != "none":
        return load_for_generation(model, dtype, device_here(), adapter if adapted else None, revision)
    if getattr(load_config(model), "quantization_config", None) is not None:
        base = _as_read(model, revision, dtype)
    else:
        base = load(model.name, dtype, model.trust_remote_code, revision=revision)
    if adapted:
        return put_on(base, adapter)
    resize(base, vocabulary(base, adapter, load_adapter(adapter / ADAPTER_FILE)))
    return base


def dtype_to_compare_in(model: ModelConfig) -> torch.dtype | None:
    """Quantised weights are made values in what is computed in: the same here and in the merge; None: any will do."""
    return None if model.quantization == "none" else compute_dtype(model.dtype, device_here())


def _as_read(model: ModelConfig, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model that was published in FP8, as training read it.

    transformers 5.23 takes blocks for smaller than they are where the last ones of a matrix are cut off.
    """
    base = skeleton(model).requires_grad_(False)
    weights = open_weights(locate(model, revision), base)
    fill_buffers(base, weights)
    hold_in(base, dtype)
    for name, parameter in base.named_parameters():
        values = weights(name, 0, parameter.numel()).view(parameter.shape).to(parameter.dtype)
        torch.utils.swap_tensors(parameter, nn.Parameter(values, requires_grad=False))
    return base.eval()
