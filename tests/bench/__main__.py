"""The training step beside the recipe of the tutorials: padding, full logits, one batch of documents a time.

Both train the same LoRA on the same documents of the bundled demo's general questions, alternating in one process, so
that whatever else the machine does hits both. What counts is the ratio of real (unpadded) tokens a second.

    make bench
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from raytune_ds import engines
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import EngineConfig, ModelConfig, TrainConfig
from raytune_ds.console import say, table
from raytune_ds.data.batch import collate
from raytune_ds.data.formats import to_example
from raytune_ds.data.packing import first_fit_decreasing
from raytune_ds.data.template import Encoded, Encoder
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.demo.data import general_rows
from raytune_ds.loop import optimizer_step
from raytune_ds.model import tiny
from raytune_ds.model.build import build
from raytune_ds.objectives import OBJECTIVES
from raytune_ds.world import World

ALTERNATIONS = 5
DOCUMENTS = 256
SEQ_LEN = 512
PADDED_BATCH = 8

Step = Callable[[], float]


def packed(model_dir: Path, documents: Sequence[Encoded]) -> Step:
    """Our step on all documents; returns the mean loss."""
    built = build(
        ModelConfig(name=str(model_dir)),
        AdapterConfig(),
        seed=0,
        dtype=torch.float32,
        trained_dtype=torch.float32,
    )
    lengths = np.array([len(d.ids) - 1 for d in documents])
    packs = [_pack([documents[i] for i in members]) for members in first_fit_decreasing(lengths, SEQ_LEN)]
    batches = [collate(packs[i : i + 4]) for i in range(0, len(packs), 4)]
    task = engines.Task(
        built=built,
        train=TrainConfig(),
        engine=EngineConfig(),
        world=World.alone(),
        micro_batch=4,
        accumulation=len(batches),
        total_steps=2 * ALTERNATIONS,
        warmup_steps=0,
    )
    engine = engines.build("ddp", task)
    return lambda: optimizer_step(engine, OBJECTIVES["sft"], batches, World.alone(), lr=1e-4)["loss"]


def _pack(members: Sequence[Encoded]) -> dict[str, np.ndarray]:
    return {
        "ids": np.concatenate([d.ids[:-1] for d in members]),
        "targets": np.concatenate([d.ids[1:] for d in members]),
        "weights": np.concatenate([d.weights[1:] for d in members]),
        "lengths": np.array([len(d.ids) - 1 for d in members]),
        "docs": np.zeros(len(members), np.int64),
    }


def padded(model_dir: Path, documents: Sequence[Encoded]) -> Step:
    """The recipe's step on all documents; returns the mean loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    batches = [_pad(documents[i : i + PADDED_BATCH]) for i in range(0, len(documents), PADDED_BATCH)]
    weight = sum(d.num_supervised for d in documents)

    def step() -> float:
        total = 0.0
        for ids_BT, labels_BT, mask_BT in batches:
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
            flat = logits_BTV[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(flat, labels_BT[:, 1:].flatten(), reduction="sum") / weight
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _pad(documents: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(d.ids) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, d in enumerate(documents):
        ids[row, : len(d.ids)] = torch.tensor(d.ids)
        supervised = torch.tensor(d.weights) != 0
        labels[row, : len(d.ids)] = torch.where(supervised, torch.tensor(d.ids), -100)
        mask[row, : len(d.ids)] = 1
    return ids, labels, mask


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(2)
    disable_progress_bar()
    rows = list(general_rows())
    chosen = np.random.default_rng(0).permutation(len(rows))[:DOCUMENTS]
    with tempfile.TemporaryDirectory() as folder:
        model_dir = tiny.build(
            "qwen2", lambda: (r["instruction"] + r["output"] for r in rows), 0, Path(folder) / "m"
        )
        encoder = Encoder(load_tokenizer(TokenizerSpec(str(model_dir))))
        documents = [encoder.encode(to_example(rows[i], "alpaca"))[0] for i in chosen]
        tokens = sum(len(d.ids) for d in documents)
        steps = {
            "raytune_ds, packed": packed(model_dir, documents),
            "padded recipe": padded(model_dir, documents),
        }
        losses = {name: step() for name, step in steps.items()}  # warms up, and shows that both do the same
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ALTERNATIONS):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                rates[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    slowest = medians["padded recipe"]
    table(
        f"LoRA, tiny qwen2, {DOCUMENTS} documents, {tokens:,} tokens, {ALTERNATIONS} alternations",
        ["", "tokens/s", "ratio", "first loss"],
        [[n, f"{m:,.0f}", f"{m / slowest:.2f}", f"{losses[n]:.6f}"] for n, m in medians.items()],
    )
    say(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, 2 threads")


if __name__ == "__main__":
    main()
