"""What a token takes: held against torch's own count of the operations, and GPUs known by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.data.batch import collate
from raytune_ds.model import adapters, tiny
from raytune_ds.model.build import build
from raytune_ds.model.flops import Flops, Utilisation, peak_flops, peak_of

FLOAT = torch.float32
TOKENS = 64


def counted(folder: Path, adapter: AdapterConfig) -> tuple[float, float]:
    """The operations of products with parameters, and those of attention, forward and back, as torch sees them happen.

    Attention is of the whole square: eager attention computes also what its mask then hides.
    """
    settings: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = adapters.apply(AutoModelForCausalLM.from_pretrained(folder, **settings), adapter, FLOAT)
    model.train()
    ids = torch.randint(0, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    by_operation = {str(operation): n for operation, n in counter.get_flop_counts()["Global"].items()}
    return by_operation["aten.mm"] + by_operation.get("aten.addmm", 0), by_operation["aten.bmm"]


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "deepseek-v4"])
@pytest.mark.parametrize(("kind", "tolerance"), [("none", 1e-9), ("lora", 0.04)])
def test_as_many_as_torch_counts(
    tiny_models: dict[str, Path], architecture: str, kind: str, tolerance: float
) -> None:
    """Exactly; but with frozen weights nothing flows back into the first layer's projections, which is not seen."""
    folder = tiny_models[architecture]
    adapter = AdapterConfig(kind=kind, dropout=0.0)
    flops = Flops.of(build(ModelConfig(name=str(folder)), adapter, 0, FLOAT, FLOAT))
    products, attention = counted(folder, adapter)
    assert flops.of_step(TOKENS, TOKENS, 0) == pytest.approx(products, rel=tolerance)  # all is trained on
    if architecture != "deepseek-v3.2":
        assert flops.of_step(0, 0, TOKENS**2) == pytest.approx(attention, rel=1e-3)  # and rotary embeddings
    else:
        assert flops.per_pair == 0, "it attends to some keys only"


def test_documents_attend_to_themselves_alone() -> None:
    """Each token to those before it and to itself; tokens that are not trained on as well."""
    packs: list[Any] = [
        {
            "ids": np.arange(1, 10),
            "targets": np.arange(2, 11),
            "weights": np.array([0, 0.5, 1, 0, 0, 1, 1, 0, 0]),
            "lengths": np.array(lengths),
            "docs": np.arange(len(lengths)),
        }
        for lengths in ([4, 5], [1, 1, 7])
    ]
    assert collate(packs).num_pairs == (4 * 5 + 5 * 6 + 2 + 2 + 7 * 8) // 2
    assert collate(packs).num_targets == 8


def test_what_a_step_makes_of_the_hardware() -> None:
    row = {"tokens": 100, "targets": 50, "pairs": 1000, "step_time_s": 2.0}
    flops = Flops(per_token=3e9, per_target=1e9, per_pair=1e8)
    needed = 100 * 3e9 + 50 * 1e9 + 1000 * 1e8
    assert Utilisation(flops, 1e12).figures(row) == pytest.approx(
        {"model_tflops": needed / 2 / 1e12, "mfu": needed / 2 / 1e12}
    )
    assert Utilisation(flops, 4e12).figures(row)["mfu"] == pytest.approx(needed / 2 / 4e12)
    assert "mfu" not in Utilisation(flops, None).figures(row)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known_gpus(name: str, tflops: float) -> None:
    assert peak_of(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""])
def test_of_others_nothing_is_claimed(name: str) -> None:
    assert peak_of(name) is None


def test_nor_of_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None
