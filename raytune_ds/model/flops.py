"""What training on a token takes in floating-point operations, and what a GPU could do in a second.

Their ratio is the model FLOPs utilisation (MFU) of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the
operations that the model needs, not those that were done. What activation checkpointing computes anew counts as time
lost. Operations are counted as in Kaplan et al. 2020 (arXiv:2001.08361, section 2.1): a token takes two per parameter
of a matrix on the way forward, and as many twice on the way back, once for the activations' gradients and once for the
parameter's own. The latter does not exist where the parameter is frozen, so it is six per trained and four per frozen
parameter. Of routed experts a token meets `num_experts_per_tok`, and no more is counted.

Left out: attention scores, which grow with the length of documents (for 4,096 tokens of a 7B model about a twelfth), so
MFU reads low where documents are long, and padding. DeepSeek-V4's compressors count as if they ran on every token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ds.model.build import Built
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
    """

    per_token: float
    per_target: float

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
            per_token=body, per_target=_of_matrix("head", head.weight.shape, head.weight.requires_grad)
        )


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


def peak_flops(device: torch.device) -> float | None:
    """The bfloat16 operations that the device could do in a second; None where nobody told us."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The same by the device's name. Of a slice of a GPU (MIG) nothing is known."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS if words.issuperset(key.split())), None)
