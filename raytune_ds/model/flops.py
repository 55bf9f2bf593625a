"""What training on a token takes in floating-point operations, and what a GPU could do in a second.

Their ratio is the model FLOPs utilisation (MFU) of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the
operations that the model needs, not those that were done. What activation checkpointing computes anew counts as time
lost, and so does padding. Operations are counted as in Kaplan et al. 2020 (arXiv:2001.08361, section 2.1): a token
takes two per parameter of a matrix on the way forward, and as many twice on the way back, once for the activations'
gradients and once for the parameter's own. The latter does not exist where the parameter is frozen, so it is six per
trained and four per frozen parameter. Of routed experts a token meets `num_experts_per_tok`, and no more is counted.

Attention is counted by pairs of a token and one that it attends to, of which a document of n tokens has n (n + 1) / 2.
In each layer and head a pair takes 2 K operations for its score and 2 V for its part of the output, K and V the sizes
of a key and a value, and twice as many on the way back, where neither factor of the two products is a constant:
6 (K + V) in all. That is PaLM's 12 L H Q T a token (L layers, H heads of size Q, T tokens), but for what a causal mask
and the borders of documents leave out of the square (the mask as in Dao 2023, arXiv:2307.08691, section 4.1).

Left out: attention where it is not causal attention and no more (DeepSeek-V3.2's chosen keys, V4's compressed ones,
windows), so MFU reads low there on long documents. V4's compressors count as if they ran on every token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ds.model.build import Built
from raytune_ds.model.load import attends_causally
from raytune_ds.model.quantize import logical_shapes

FORWARD, FROZEN, TRAINED = 2, 4, 6
_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")

# bfloat16 on the matrix units, dense, summed in float32, in TFLOP/s, by words of the device's name: the first line
# whose words are all there. From the data sheets at nvidia.com/data-center and amd.com/instinct (which often print the
# sparse figure, twice as high), and for GeForce from NVIDIA's architecture white papers.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250),
    ("GH200", 989),
    ("H200 NVL", 835),
    ("H200", 989),
    ("H100 NVL", 835),
    ("H100 PCIe", 756),
    ("H100", 989),
    ("H800", 989),
    ("H20", 148),
    ("A100", 312),
    ("A800", 312),
    ("A40", 150),
    ("A30", 165),
    ("A10G", 70),
    ("A10", 125),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
    ("MI300X", 1307),
    ("MI250X", 191),  # torch sees each of its two dies
)


@dataclass(frozen=True)
class Flops:
    """What training takes.

    Attributes:
        per_token: of the text, in floating-point operations.
        per_target: on top, where a token is trained on: only there are logits made.
        per_pair: on top, of a token and one that it attends to; 0 where attention is not counted.
    """

    per_token: float
    per_target: float
    per_pair: float = 0.0

    @staticmethod
    def of(built: Built) -> Flops:
        """Of a model whose parameters are all there, by shape at least: before an engine spreads them."""
        head, embedding = built.base.get_output_embeddings(), built.base.get_input_embeddings()
        apart = {id(head.weight), id(embedding.weight)}
        active = _active_experts(built.base.config)
        quantized = logical_shapes(built.module)
        body = sum(
            _of_matrix(name, quantized.get(name, parameter.shape), parameter.requires_grad)
            * (active if "experts" in name.split(".") else 1.0)
            for name, parameter in built.module.named_parameters()
            if id(parameter) not in apart
        )
        return Flops(
            per_token=body,
            per_target=_of_matrix("head", head.weight.shape, head.weight.requires_grad),
            per_pair=_of_pair(built.base.config),
        )

    def of_step(self, tokens: float, targets: float, pairs: float) -> float:
        """What so many tokens take, of which some are trained on, and which attend to so many in all."""
        return self.per_token * tokens + self.per_target * targets + self.per_pair * pairs


@dataclass(frozen=True)
class Utilisation:
    """How much of what the hardware could do a run makes use of.

    Attributes:
        flops: what training takes.
        peak: operations that all workers together could do in a second; None where that is not known.
    """

    flops: Flops
    peak: float | None

    def figures(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Of a step's row of metrics.jsonl: `model_tflops`, the TFLOP/s of all workers together that the model needed,
        and `mfu`, their share of what the hardware could do, where that is known.
        """
        needed = self.flops.of_step(row["tokens"], row["targets"], row["pairs"]) / row["step_time_s"]
        return {"model_tflops": needed / 1e12} | ({"mfu": needed / self.peak} if self.peak else {})


def _of_matrix(name: str, shape: torch.Size, trained: bool) -> float:
    if len(shape) < 2:
        return 0.0
    if "indexer" in name.split("."):  # what is attended to is chosen without a way back
        return shape.numel() * FORWARD
    return shape.numel() * (TRAINED if trained else FROZEN)


def _active_experts(config: Any) -> float:
    """The share of the routed experts that a token meets; 1 where there are none."""
    total = next((n for key in _NUM_EXPERTS if (n := getattr(config, key, None))), None)
    return config.num_experts_per_tok / total if total else 1.0


def _of_pair(config: Any) -> float:
    """Over all layers and heads; see the module."""
    if not attends_causally(config):
        return 0.0
    heads = config.num_attention_heads
    value = getattr(config, "v_head_dim", None)
    if value:  # MLA, whose config calls the rotary part of a key head_dim
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
    else:
        key = value = getattr(config, "head_dim", None) or config.hidden_size // heads
    return TRAINED * (key + value) * heads * config.num_hidden_layers


def peak_flops(device: torch.device) -> float | None:
    """The bfloat16 operations that the device could do in a second; None where nobody told us."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The same by the device's name. Of a slice of a GPU (MIG) nothing is known."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS if words.issuperset(key.split())), None)
