"""The cases, the batches they run on, and the plain process they are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.data.batch import Batch, collate

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "zero", "stage": 1},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3},
    "zero2+offload": {"kind": "zero", "stage": 2, "offload": "optimizer"},
    "zero3+offload": {"kind": "zero", "stage": 3, "offload": "parameters"},
    "fsdp": {"kind": "fsdp"},
}
KINDS = ("full", "lora")
LORA = ("lora", "lora all")
WORLDS = (1, 2, 3)
MODELS = ("deepseek-v3", "qwen2")
STEPS = 10
GLOBAL_BATCH = 8  # which three workers share unevenly, and no worker cuts into three equal micro-batches
ACCUMULATION = 3
TRAIN = TrainConfig(
    learning_rate=1e-3,
    weight_decay=0.1,
    # With the customary 1e-8 AdamW makes a whole step of a gradient that is nothing but rounding, and one element of
    # thousands goes its own way in any two right runs.
    adam_epsilon=1e-6,
    max_grad_norm=1.0,
    lr_scheduler_type="linear",
    global_batch=GLOBAL_BATCH,
)


@dataclass(frozen=True)
class Case:
    """One run of an engine.

    Attributes:
        dtype: that is computed in.
        given: a ds_config.json's content.
        quantization: of the base model.
        start: a checkpoint of `start_step` steps to go on from; none: from the beginning.
        save: where to leave a checkpoint after `stop` steps.
    """

    engine: str
    kind: str
    world: int
    model: str
    dtype: str = "float32"
    given: str | None = None
    start: str | None = None
    start_step: int = 0
    stop: int = STEPS
    save: str | None = None
    quantization: str = "none"

    @property
    def settings(self) -> EngineConfig:
        return EngineConfig(**ENGINES[self.engine])

    @property
    def adapter(self) -> AdapterConfig:
        return adapter(self.kind)

    @property
    def label(self) -> str:
        return f"{self.engine} {self.kind} {self.world} {self.model} {self.dtype}"


@dataclass(frozen=True)
class Trace:
    """What a run left: the loss of each step, and the trained weights."""

    losses: list[float]
    weights: dict[str, torch.Tensor]

    def loss_error(self, plain: Trace) -> float:
        """The largest relative difference of a step's loss; a trace of the second half is held against that half."""
        expected = plain.losses[-len(self.losses) :]
        found, wanted = (torch.tensor(losses, dtype=torch.float64) for losses in (self.losses, expected))
        return float(((found - wanted) / wanted).abs().max())

    def weight_error(self, plain: Trace) -> float:
        """The largest difference of a weight."""
        assert self.weights.keys() == plain.weights.keys()
        # torch's maximum of something with a NaN in it is NaN, and Python's is not.
        return float(
            torch.stack([(self.weights[n] - plain.weights[n]).abs().max() for n in plain.weights]).max()
        )


LOSS_LIMIT = 1e-5
HALF_LOSS_LIMIT = 3e-3
"""Of bfloat16 beside float32."""
WEIGHT_LIMIT = 1e-4


def adapter(kind: str) -> AdapterConfig:
    targets = "all" if kind == "lora all" else "auto"  # experts too, which peft reaches as bare parameters
    return AdapterConfig(kind="lora" if kind in LORA else "none", r=4, alpha=8, targets=targets)


def lr(step: int) -> float:
    return TRAIN.learning_rate * (1 - step / STEPS)


@cache
def packs(step: int) -> tuple[dict[str, np.ndarray], ...]:
    """One global batch of documents of very different lengths, so that the ranks' token counts differ."""
    rng = np.random.default_rng(step)
    made = []
    for length in rng.integers(2, 60, GLOBAL_BATCH).tolist():
        ids = rng.integers(5, 250, length + 1)
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 1.0
        made.append(
            {
                "ids": ids[:-1],
                "targets": ids[1:],
                "weights": weights,
                "lengths": np.array([length]),
                "docs": np.array([0]),
            }
        )
    return tuple(made)


def micro_batches(step: int, rank: int, world: int) -> list[Batch]:
    """A rank's share in three micro-batches, some of them empty where the share is small."""
    mine = packs(step)[rank * GLOBAL_BATCH // world : (rank + 1) * GLOBAL_BATCH // world]
    size = math.ceil(GLOBAL_BATCH / world / ACCUMULATION)
    return [collate(mine[start : start + size]) for start in range(0, size * ACCUMULATION, size)]


def reference(folder: Path, kind: str) -> Trace:
    """Plain transformers, peft and torch: one process, one forward pass a step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from raytune_ds.model.adapters import peft_config
    from raytune_ds.model.attention import register
    from raytune_ds.model.load import parts
    from raytune_ds.model.packed import PackedLM
    from raytune_ds.model.targets import choose

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=register())
    decoder, head = parts(base)
    torch.manual_seed(0)
    model: Any = base
    if kind == "lora all":
        model = get_peft_model(base, peft_config(base, adapter(kind), choose(base, adapter(kind))))
    if kind == "lora":
        targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        if "deepseek" not in folder.name:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        )
    module = PackedLM(model, decoder, head, torch.float32)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim >= 2]},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], weight_decay=0.1, eps=TRAIN.adam_epsilon, fused=False
    )
    losses = []
    for step in range(STEPS):
        batch = collate(packs(step))
        loss = (module(batch) * batch.weights_N).sum() / batch.weight.float()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), TRAIN.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        losses.append(loss.item())
    return Trace(losses, {name: p.detach().clone() for name, p in trained.items()})
