"""How well a run keeps what it promises to take of the memory: foreseen, counted tensor by tensor, and as the system
sees the process; for a model of a hundred million parameters, and each depth of activation checkpointing.

    python -m tests.bench.memory [TOKENS]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from raytune_ds import engines
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import EngineConfig, ModelConfig, TrainConfig
from raytune_ds.console import say
from raytune_ds.engines.choose import BYTES_COPIED, Sizes, state_bytes
from raytune_ds.loop import optimizer_step
from raytune_ds.model.build import build
from raytune_ds.model.footprint import LiveBytes, foreseen, one_document
from raytune_ds.objectives.sft import sft
from raytune_ds.world import World
from tests.conftest import TEXTS

MIB = 1 << 20
TOKENS = 2048
SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "vocab_size": 16_000,
    "tie_word_embeddings": False,
}


def main(tokens: int) -> None:
    # What the program holds is measured, not what malloc keeps for later.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as scratch:
        folder = _model(Path(scratch))
        say(
            "| | depth | activations foreseen, MiB | counted | with state, foreseen | resident | foreseen / resident |"
        )
        say("|---|---|---|---|---|---|---|")
        for kind in ("lora", "none"):
            for depth in ("none", "every-2", "full"):
                mp.spawn(_process, (folder, kind, depth, tokens), nprocs=1)


def _model(root: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    from raytune_ds.model import tiny

    folder = root / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE)).save_pretrained(folder)
    tiny.train_tokenizer(TEXTS).save_pretrained(folder)
    return folder


def _process(_: int, folder: Path, kind: str, depth: str, tokens: int) -> None:
    torch.set_num_threads(1)
    _step(_tiny_engine(folder, kind), 8)  # what is loaded and made on first use
    base = _resident("VmRSS")
    dtype, world = torch.float32, World.alone()
    built = build(ModelConfig(name=str(folder)), AdapterConfig(kind=kind), 0, dtype, dtype)
    built.recompute(depth)
    whole = sum(parameter.numel() for parameter in built.module.parameters())
    state = (
        state_bytes(Sizes(4 * (whole - built.trainable), built.trainable)) - BYTES_COPIED * built.trainable
    )
    promised = foreseen(built, tokens).peak
    task = engines.Task(built, TrainConfig(), EngineConfig(), world, 1, 1, 1, 0)
    engine = engines.build("ddp", task)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    _step(engine, tokens)
    resident = _resident("VmHWM") - base
    live = LiveBytes()
    with live:
        engine.module(one_document(tokens)).sum().backward()
    figures = [promised, live.peak, promised + state, resident]
    shown = " | ".join(f"{figure / MIB:,.0f}" for figure in figures)
    name = "LoRA" if kind == "lora" else "full parameters"
    say(f"| {name} | {depth} | {shown} | {(promised + state) / resident:.2f} |")


def _tiny_engine(folder: Path, kind: str) -> Any:
    built = build(ModelConfig(name=str(folder)), AdapterConfig(kind=kind), 0, torch.float32, torch.float32)
    return engines.build("ddp", engines.Task(built, TrainConfig(), EngineConfig(), World.alone(), 1, 1, 1, 0))


def _step(engine: engines.Engine, tokens: int) -> None:
    optimizer_step(engine, sft, [one_document(tokens)], World.alone(), 1e-4)


def _resident(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS)
