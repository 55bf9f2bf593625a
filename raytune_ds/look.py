"""A look at a model, without its weights: what of it will be trained, and what it decides of a config."""

from __future__ import annotations

from transformers import PreTrainedModel

from raytune_ds import hub
from raytune_ds.assignment import Base
from raytune_ds.config import Config, ModelConfig
from raytune_ds.data.tokenizer import TokenizerSpec, traits_of
from raytune_ds.found import Found
from raytune_ds.model import adapterreport, quantize
from raytune_ds.model.load import skeleton
from raytune_ds.settle import settled


def look(
    config: Config, model: ModelConfig, fingerprint: str | None, tokenizer: TokenizerSpec, root: str
) -> Found:
    """What is found of a model.

    Args:
        config: composed.
        model: with a directory in place of its name, unless it is of the hub.
        fingerprint: of its weights; None for a model of the hub, whose commit tells it from others.
        tokenizer: of the model.
        root: the absolute storage.

    Raises:
        UserError: there is no such model, or it does not go with the config.
    """
    base_model = skeleton(model)
    adapter, made = settled(config, base_model, root)
    report = adapterreport.report(base_model, adapter, made)
    revision = None if fingerprint else hub.commit_of(model.name)
    return Found(
        adapter=adapter,
        report=report,
        base=Base(
            fingerprint or f"{model.name}@{revision}",
            revision,
            report.total,
            report.trainable,
            *_quantized(base_model, model),
        ),
        traits=traits_of(tokenizer),
    )


def _quantized(base_model: PreTrainedModel, model: ModelConfig) -> tuple[int, int]:
    """How many parameters are held in few bits, and what they take.

    Raises:
        UserError: what does it is not installed.
    """
    held = quantize.packings(base_model, model.quantization).values()
    return sum(packing.shape.numel() for packing in held), sum(packing.nbytes for packing in held)
