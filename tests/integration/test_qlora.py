"""A quantised base that engines shard, and in a run of two workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Run, step_losses
from tests.matrix.cases import LOSS_LIMIT, WEIGHT_LIMIT, Case
from tests.matrix.run import run as run_cases
from tests.matrix.run import saved_then_continued

pytest.importorskip("bitsandbytes")

SHARDING = ("fsdp", "zero3")
"""Which cut the bytes up; the others hold them whole."""


def quantised(engine: str, world: int, **more: Any) -> Case:
    return Case(engine, "lora", world, "deepseek-v3", quantization="nf4", **more)


def test_who_shards_the_bytes_computes_what_one_process_does(tiny_models: dict[str, Path]) -> None:
    plain, unlike, *traces = run_cases(
        [
            quantised("ddp", 1),
            Case("ddp", "lora", 1, "deepseek-v3"),
            *(quantised(name, 2) for name in SHARDING),
        ],
        tiny_models,
    )
    assert unlike.loss_error(plain) > 100 * LOSS_LIMIT
    errors = {
        name: (trace.loss_error(plain), trace.weight_error(plain))
        for name, trace in zip(SHARDING, traces, strict=True)
    }
    beyond = {name: e for name, e in errors.items() if not (e[0] <= LOSS_LIMIT and e[1] <= 3 * WEIGHT_LIMIT)}
    assert beyond == {}


def test_one_goes_on_from_the_other(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    plain = run_cases([quantised("ddp", 1)], tiny_models)[0]
    first, then = quantised("zero3", 2), quantised("fsdp", 2)
    (trace,) = saved_then_continued([first], [(first, then)], tiny_models, tmp_path)
    assert trace.loss_error(plain) < LOSS_LIMIT


def test_a_run_of_two_workers(run: Run) -> None:
    """The check, the choice of an engine, workers of Ray, and the second half after the first."""
    settings = (
        "run.name=qlora",
        "model.quantization=nf4",
        "train.optim=adamw_8bit",
        "scaling.num_workers=2",
        "scaling.use_gpu=false",
        "data.seq_len=128",
        "train.global_batch=8",
        "train.learning_rate=2e-3",
        "checkpoint.every_steps=6",
    )
    run(*settings, "train.max_steps=6")
    result = run(*settings, "train.max_steps=12")
    losses = step_losses(result.run)
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert result.engine == "ddp"
    assert Path(result.run, "final", "adapter_model.safetensors").exists()
