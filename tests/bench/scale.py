"""What a rank needs for a model of a third of a billion parameters, phase by phase, beside what it should need; and how
long training stands still for a checkpoint, with and without writing in the background.

    python -m tests.bench.scale [ENGINE ...]      # as in tests/matrix: zero3 fsdp ...
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from raytune_ds import engines
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.catalog import directory, read_manifest
from raytune_ds.checkpoint import Reader
from raytune_ds.config import CheckpointConfig, EngineConfig, ModelConfig, TrainConfig
from raytune_ds.data.batch import collate
from raytune_ds.export import save_final
from raytune_ds.loop import optimizer_step
from raytune_ds.model.build import build
from raytune_ds.objectives.sft import sft
from raytune_ds.rundir import RunDir
from raytune_ds.saver import Label, Saver
from raytune_ds.world import World
from tests.conftest import TEXTS
from tests.matrix.cases import ENGINES
from tests.matrix.run import free_port

WORLD = 2
STEPS = 8
SAVE_EVERY = 2
TOKENS = 64
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
MIB = 1 << 20
out = Console(width=120)


def main(names: list[str]) -> None:
    # What the program holds is measured, not what malloc keeps for later.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(MIB), "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as scratch:
        folder = _model(Path(scratch))
        for name in names:
            context = mp.spawn(_process, (name, free_port(), folder, scratch), nprocs=WORLD, join=False)
            assert context is not None
            while not context.join(timeout=5):
                pass


def _model(root: Path) -> Path:
    """A model directory with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from raytune_ds.model import tiny

    tokenizer = tiny.train_tokenizer(TEXTS)
    config = AutoConfig.for_model("qwen2", **SHAPE, vocab_size=32_000, tie_word_embeddings=False)
    folder = root / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Watch:
    """The most memory of this process in each phase, over what it had after the imports."""

    def __init__(self) -> None:
        self._process, self.peaks, self._phase = psutil.Process(), {}, "idle"
        self.peaks: dict[str, float] = {}
        self._base = self._process.memory_info().rss
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            used = (self._process.memory_info().rss - self._base) / MIB
            self.peaks[self._phase] = max(used, self.peaks.get(self._phase, 0.0))
            time.sleep(0.005)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase = name
        yield
        self._phase = "idle"


def _process(rank: int, name: str, port: int, folder: Path, scratch: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    os.environ |= {"WORLD_SIZE": str(WORLD), "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    world, config = World(rank, WORLD, torch.device("cpu")), EngineConfig(**ENGINES[name])
    if config.kind == "zero":
        import deepspeed  # noqa: F401  # before memory is counted
    watch = Watch()
    with watch.phase("load"):
        dtype = torch.float32
        built = build(ModelConfig(name=str(folder)), AdapterConfig(kind="none"), 0, dtype, dtype)
        train = TrainConfig(global_batch=WORLD, max_grad_norm=1.0)
        engine = engines.build(config.kind, engines.Task(built, train, config, world, 1, 1, STEPS, 0))
    steps = iter(range(10**6))

    def step() -> None:
        optimizer_step(engine, sft, [_batch(next(steps), rank)], world, 1e-4)

    with watch.phase("train"):
        for _ in range(2):
            step()
    stalls = {}
    for background in (False, True):
        with watch.phase("save, background" if background else "save"):
            stalls[background] = _stall(
                engine, built, world, f"{scratch}/{name}-{background}", background, step
            )
    with watch.phase("export"):
        path = directory(f"{scratch}/{name}-True", STEPS)
        reader = Reader(path, read_manifest(path))
        run = RunDir(f"{scratch}/{name}-run")
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        adapter = AdapterConfig(kind="none")
        save_final(run, ModelConfig(name=str(folder)), adapter, reader, tokenizer, dtype, "", world)
    peaks = world.gather(watch.peaks)
    if rank == 0:
        _print(name, built.trainable, peaks, stalls)
    dist.barrier()
    dist.destroy_process_group()


def _batch(step: int, rank: int) -> Any:
    ids = torch.randint(
        5, 300, (TOKENS + 1,), generator=torch.Generator().manual_seed(step * WORLD + rank)
    ).numpy()
    weights = torch.ones(TOKENS).numpy()
    return collate(
        [
            {
                "ids": ids[:-1],
                "targets": ids[1:],
                "weights": weights,
                "lengths": torch.tensor([TOKENS]).numpy(),
                "docs": torch.zeros(1).numpy(),
            }
        ]
    )


def _stall(
    engine: engines.Engine, built: Any, world: World, root: str, background: bool, step: Callable[[], None]
) -> float:
    """The share of the time that training stands still for checkpoints, from the first one on, which waits for none."""
    shapes = engines.state_shapes(built.trained)
    config = CheckpointConfig(background=background, keep=1)
    saver = Saver(root, config, {}, engine, shapes, world, done=lambda _: None, warn=print)
    started = waited = 0.0
    for number in range(1, STEPS + 1):
        step()
        if number % SAVE_EVERY == 0:
            stood_still = saver.save(Label(number, {}, None))
            waited += stood_still if started else 0.0
            started = started or time.perf_counter()
    total = time.perf_counter() - started
    saver.wait()
    return waited / total


def _print(name: str, trainable: int, peaks: list[dict[str, float]], stalls: dict[bool, float]) -> None:
    share = trainable * 4 / WORLD / MIB  # float32 parameters of one rank
    largest = SHAPE["hidden_size"] * 32_000 * 4 / MIB  # the embedding
    # DeepSpeed keeps float32 masters beside what it computes with, which is float32 here, and a buffer of gradients.
    state = share * (5 if name.startswith("zero") else 3)
    train = state if name.startswith("zero") else state + share
    step = train + 4 * largest
    files = 2 * 256
    ideal = {
        "load": (state + largest, "state of a rank, one whole parameter"),
        "train": (step, "and gradients; embedding and head gathered, and their gradients"),
        "save": (max(step, train + files), "the same, or two files of 256 MiB"),
        "save, background": (step + 3 * share + files, "both, and a copy of parameters and moments"),
        "export": (train + 3 * share + 3 * 1024, "state, copy, and three times a file of 1 GiB"),
    }
    table = Table(
        title=f"{name}: {trainable / 1e6:.0f}M parameters, {WORLD} ranks; MiB over the imports",
        title_justify="left",
    )
    for column in ("phase", *(f"rank {r}" for r in range(WORLD)), "by design", "which is"):
        table.add_column(column)
    whole = trainable * 4 / MIB
    for phase, (value, meaning) in ideal.items():
        table.add_row(phase, *(f"{p[phase]:,.0f}" for p in peaks), f"{value:,.0f}", meaning)
    table.add_row(
        "", *("" for _ in range(WORLD)), f"{whole:,.0f}", "the whole model's parameters, for comparison"
    )
    out.print(table)
    out.print(
        f"training stood still for checkpoints, one every second step: {stalls[False]:.0%} of the time when it waits "
        f"for the disk, {stalls[True]:.0%} when they are written in the background\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or ["zero3", "fsdp"])
