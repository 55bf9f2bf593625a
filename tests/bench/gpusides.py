"""The sides of the GPU bench: our optimizer step, and the tutorials' with padded batches, on the same weights and rows.

Weights are drawn on the device, by their names, so that all sides begin alike and nothing is read from a disk.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raytune_ds import engines
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import EngineConfig, ModelConfig, TrainConfig
from raytune_ds.data.batch import Batch, collate
from raytune_ds.loop import optimizer_step
from raytune_ds.model import attention, build
from raytune_ds.model.flops import Flops
from raytune_ds.model.kernels import Kernels
from raytune_ds.objectives import OBJECTIVES
from raytune_ds.world import World
from tests.bench.gpushapes import Documents

LR = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS_MLA = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
R, ALPHA = 16, 32


@dataclass(frozen=True)
class Case:
    """What all sides of a comparison share."""

    shape: Mapping[str, Any]
    documents: Documents
    device: torch.device
    dtype: torch.dtype
    lora: bool
    folder: Path

    @property
    def targets(self) -> list[str]:
        """The modules that LoRA is put on: all linear ones; of models with experts those of attention."""
        return TARGETS_MLA if "kv_lora_rank" in self.shape else TARGETS


@dataclass(frozen=True)
class Side:
    """Something that makes optimizer steps.

    Attributes:
        step: one update on all documents; the mean loss before it.
        flops: that the step needs; None where nobody counted.
        micro_batches, losses_of: ours only: what a step is made of.
    """

    step: Callable[[], float]
    flops: float | None = None
    micro_batches: list[Batch] = field(default_factory=list)
    losses_of: Callable[[Batch], torch.Tensor] | None = None


class Drawn:
    """Weights by name in place of a model's files: see Weights."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """`model` tells shapes."""
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._device = device

    def __call__(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Read; on the device."""
        return values(name, self._shapes[name], self._device).reshape(-1)[start:stop]

    def __contains__(self, name: str) -> bool:
        """No buffer is read."""
        return False


def values(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """What a parameter begins with: float32, the same whenever it is asked for."""
    if len(shape) == 1 or "lora_B" in name:
        return torch.full(shape, float(len(shape) == 1 and not name.endswith("bias")), device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device) * 0.02


@torch.no_grad()
def _draw_adapter(module: nn.Module, prefix: str, device: torch.device) -> None:
    for name, p in module.named_parameters():
        if "lora_" in name:
            p.copy_(values(name.removeprefix(prefix), p.shape, device))


def ours(
    case: Case,
    *,
    pack: int = 2048,
    packs: int = 4,
    recompute: bool = False,
    optim: str = "adamw_torch",
    **switches: Any,
) -> Side:
    """Our step, by what a run uses: `build`, the ddp engine and `optimizer_step`.

    Args:
        case: what is computed.
        pack: tokens of one.
        packs: of a micro-batch.
        recompute: activations, in the backward pass.
        optim: the optimizer.
        switches: attention and experts_implementation of the model section; liger and compiled of `Kernels`.
    """
    folder = _config_folder(case)
    chosen = {key: switches.pop(key) for key in ("attention", "experts_implementation") if key in switches}
    model = ModelConfig(name=str(folder), **chosen)
    adapter = AdapterConfig(kind="none")
    if case.lora:
        adapter = AdapterConfig(r=R, alpha=ALPHA, targets=tuple(case.targets))
    with mock.patch.object(build, "open_weights", lambda _, base: Drawn(base, case.device)):
        built = build.build(model, adapter, 0, case.dtype, torch.float32, device=case.device)
    built.recompute("full" if recompute else "none")
    Kernels(model.attention, **{"liger": False, "compiled": False, **switches}).put_into(
        built.base, built.blocks
    )
    flops = Flops.of(built)
    packed = case.documents.packs(pack)
    batches = [collate(packed[i : i + packs]) for i in range(0, len(packed), packs)]
    world = World(0, 1, case.device)
    task = engines.Task(
        built=built,
        train=TrainConfig(optim=optim),  # type: ignore[arg-type]
        engine=EngineConfig(),
        world=world,
        micro_batch=packs,
        accumulation=len(batches),
        total_steps=100,
        warmup_steps=0,
    )
    engine = engines.build("ddp", task)
    engine.module.train()
    _draw_adapter(engine.module, "model.", case.device)

    def step() -> float:
        attention.choose(model.attention)  # of the process, and other sides chose theirs
        return float(optimizer_step(engine, OBJECTIVES["sft"], batches, world, LR)["loss"])

    needed = sum(flops.of_step(b.num_tokens, b.num_targets, b.num_pairs) for b in batches)
    return Side(step, needed, batches, partial(_losses, engine.module, model.attention))


def _losses(module: nn.Module, chosen: str, batch: Batch) -> torch.Tensor:
    attention.choose(chosen)
    losses: torch.Tensor = module(batch)
    return losses


def _config_folder(case: Case) -> Path:
    config = AutoConfig.for_model(**case.shape)
    folder = case.folder / str(zlib.crc32(repr(sorted(case.shape.items(), key=str)).encode()))
    config.save_pretrained(folder)
    return folder


def padded(case: Case, *, batch: int, recompute: bool) -> Side:
    """The tutorials' step with transformers and peft: batches padded to their longest row, and the logits of all of it.

    By hand and not by their Trainer, whose own work comes on top, so what it is compared with is a little too fast.
    """
    model = _plain(case)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    ready: nn.Module = model
    if case.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=case.targets, task_type="CAUSAL_LM")
        ready = get_peft_model(model, lora)
        _draw_adapter(ready, "", case.device)
    ready.train()
    trained = [p for p in ready.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    documents, count = case.documents, case.documents.supervised
    batches = [
        _pad(documents, range(i, min(i + batch, len(documents.ids))))
        for i in range(0, len(documents.ids), batch)
    ]

    def step() -> float:
        total = torch.zeros((), device=case.device)
        for ids_BT, mask_BT, labels_BT in batches:
            inputs = {
                "input_ids": ids_BT.to(case.device),
                "attention_mask": mask_BT.to(case.device),
                "labels": labels_BT.to(case.device),
            }
            autocast = torch.autocast(case.device.type, case.dtype, enabled=case.dtype != torch.float32)
            with autocast:
                loss = ready(**inputs, num_items_in_batch=torch.tensor(count, device=case.device)).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return Side(step)


def _plain(case: Case) -> PreTrainedModel:
    # As people load them: weights that are trained in float32, the others in what is computed in.
    held = case.dtype if case.lora else torch.float32
    with torch.device(case.device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**case.shape), dtype=held, attn_implementation="sdpa"
        )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values(name, p.shape, case.device))
    return model


def _pad(documents: Documents, members: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(documents.ids[i]) for i in members)
    ids = torch.zeros(len(members), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, i in enumerate(members):
        size, answer = len(documents.ids[i]), documents.answers[i]
        ids[row, :size] = torch.from_numpy(documents.ids[i])
        labels[row, size - answer : size] = ids[row, size - answer : size]
        mask[row, :size] = 1
    return ids, mask, labels
