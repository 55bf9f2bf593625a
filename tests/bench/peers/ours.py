"""Our loop, as a worker runs it, without Ray: packs, supervised logits, one optimizer."""

from __future__ import annotations

from tests.bench import protocol

if __name__ == "__main__":
    protocol.own_stdout()

    import numpy as np
    import peft  # noqa: F401  # as in all sides: what libraries take is not counted
    import torch

    from raytune_ds import allocator, engines
    from raytune_ds.adapterconfig import AdapterConfig
    from raytune_ds.config import EngineConfig, ModelConfig, TrainConfig
    from raytune_ds.data.batch import Pack, collate
    from raytune_ds.data.packing import first_fit_decreasing
    from raytune_ds.loop import optimizer_step
    from raytune_ds.memory import busy_packs
    from raytune_ds.model.build import build
    from raytune_ds.model.flops import Flops
    from raytune_ds.objectives import OBJECTIVES
    from raytune_ds.world import World
    from tests.bench.peers.case import told

    case, passes = told(), protocol.Passes()
    torch.set_num_threads(case.threads)
    seq_len = case.seq_len
    micro_batch = case.options.get("micro_batch") or busy_packs(seq_len, torch.device("cpu"))
    dtype = getattr(torch, case.dtype)
    built = build(
        ModelConfig(name=case.model, **case.options.get("model", {})),
        AdapterConfig(targets=case.lora) if case.lora else AdapterConfig(kind="none"),
        seed=0,
        dtype=dtype,
        trained_dtype=torch.float32,
    )
    built.recompute(case.options.get("depth", "none"))
    rows = case.rows()

    def pack(members: list[int]) -> Pack:
        """Documents end to end, targets shifted by one, as the store has them."""
        ids = [np.array(rows[i]["input_ids"]) for i in members]
        labels = [np.array(rows[i]["labels"]) for i in members]
        return {
            "ids": np.concatenate([d[:-1] for d in ids]),
            "targets": np.concatenate([d[1:] for d in ids]),
            "weights": np.concatenate([(d[1:] != -100).astype(np.float32) for d in labels]),
            "lengths": np.array([len(d) - 1 for d in ids]),
            "docs": np.array(members),
        }

    lengths = np.array([len(row["input_ids"]) - 1 for row in rows])
    packs = [pack(members) for members in first_fit_decreasing(lengths, max(seq_len, lengths.max()))]
    batches = [collate(packs[i : i + micro_batch]) for i in range(0, len(packs), micro_batch)]
    task = engines.Task(
        built=built,
        train=TrainConfig(),
        engine=EngineConfig(),
        world=World.alone(),
        micro_batch=micro_batch,
        accumulation=len(batches),
        total_steps=1000,
        warmup_steps=0,
    )
    flops = Flops.of(built)
    needed = sum(flops.of_step(b.num_tokens, b.num_targets, 0) for b in batches)
    engine = engines.build("ddp", task)
    engine.module.train()
    allocator.keep_freed_memory()
    while True:
        passes.begin()
        done = optimizer_step(engine, OBJECTIVES["sft"], batches, World.alone(), lr=case.learning_rate)
        passes.end(done["loss"], flops=needed)
