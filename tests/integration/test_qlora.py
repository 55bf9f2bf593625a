"""A quantised base that engines shard, and in a run of two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import Run, step_losses
from tests.matrix.cases import LOSS_LIMIT, WEIGHT_LIMIT, Case, Trace
from tests.matrix.run import halves
from tests.matrix.run import run as run_cases

pytest.importorskip("bitsandbytes")

SHARDING = ("fsdp", "zero3")
"""Which cut the bytes up; the others hold them whole."""


def quantised(engine: str, world: int) -> Case:
    return Case(engine, "lora", world, "deepseek-v3", quantization="nf4")


@pytest.fixture(scope="module")
def traces(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """Of one process, of one whose base is not quantised, of each that shards, and of the second half of a pair."""
    first, then = halves([(quantised("zero3", 2), quantised("fsdp", 2))], tmp_path_factory.mktemp("saved"))
    cases = [
        quantised("ddp", 1),
        Case("ddp", "lora", 1, "deepseek-v3"),
        *(quantised(name, 2) for name in SHARDING),
    ]
    names = ["plain", "unlike", *SHARDING, "first half", "second half"]
    return dict(zip(names, run_cases([*cases, *first, *then], tiny_models), strict=True))


def test_who_shards_the_bytes_computes_what_one_process_does(traces: dict[str, Trace]) -> None:
    plain = traces["plain"]
    assert traces["unlike"].loss_error(plain) > 100 * LOSS_LIMIT
    errors = {name: (traces[name].loss_error(plain), traces[name].weight_error(plain)) for name in SHARDING}
    beyond = {name: e for name, e in errors.items() if not (e[0] <= LOSS_LIMIT and e[1] <= WEIGHT_LIMIT)}
    assert beyond == {}


def test_one_goes_on_from_the_other(traces: dict[str, Trace]) -> None:
    assert traces["second half"].loss_error(traces["plain"]) < LOSS_LIMIT


def test_a_run_of_two_workers(run: Run) -> None:
    """The check, the choice of an engine, and workers of Ray; tests/unit/test_qlora.py stops and goes on."""
    result = run(
        "run.name=qlora",
        "model.quantization=nf4",
        "train.optim=adamw_8bit",
        "scaling.num_workers=2",
        "scaling.use_gpu=false",
        "data.seq_len=128",
        "train.global_batch=8",
        "train.learning_rate=2e-3",
        "train.max_steps=12",
    )
    losses = step_losses(result.run)
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert result.engine == "ddp"
    assert Path(result.run, "final", "adapter_model.safetensors").exists()
