"""Every engine gives the model that one plain process gives, and goes on from any other's checkpoint.

A part of `make parity` that covers every engine, both kinds, both models, and worlds that do not divide the batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.cases import (
    ENGINES,
    HALF_LOSS_LIMIT,
    KINDS,
    LOSS_LIMIT,
    MODELS,
    WEIGHT_LIMIT,
    Case,
    Trace,
    reference,
)
from tests.matrix.run import halves, run

# The first of them runs all that is here; and DeepSpeed compiles its CPU optimizer where it has not been yet.
pytestmark = pytest.mark.timeout(1200)

NAMES = list(ENGINES)
WHOLE = [
    Case(engine, kind, 3, MODELS[(number + shift) % 2])
    for number, engine in enumerate(NAMES)
    for shift, kind in enumerate(KINDS)
]
HALF = [
    Case(engine, kind, 2, "deepseek-v3", dtype="bfloat16")
    for engine in ("ddp", "zero2", "zero3", "fsdp")
    for kind in KINDS
]
ADAPTED = [Case(engine, "lora all", 2, "deepseek-v3") for engine in ("ddp", "zero2", "zero3", "fsdp")]
PORTABLE = [
    (Case(a, KINDS[number % 2], 2, "deepseek-v3"), Case(b, KINDS[number % 2], 3, "deepseek-v3"))
    for number, (a, b) in enumerate(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))
]
ROUND_ROBIN = '{"zero_optimization": {"round_robin_gradients": true}}'
SECONDARY = '{"zero_optimization": {"zero_hpz_partition_size": 2}}'
GIVEN = [
    (Case("zero2", "full", 2, "qwen2", given=ROUND_ROBIN), Case("ddp", "full", 2, "qwen2")),
    (Case("zero3", "full", 2, "qwen2"), Case("zero3", "full", 2, "qwen2", given=SECONDARY)),
]

Plain = dict[tuple[str, str], Trace]
Traces = dict[Case | tuple[Case, Case], Trace]


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, Path]) -> Plain:
    return {(model, kind): reference(tiny_models[model], kind) for model in MODELS for kind in KINDS}


@pytest.fixture(scope="module")
def traces(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Of all that is here, and of a pair its second half: to start processes takes longer than most cases."""
    first, then = halves([*PORTABLE, *GIVEN], tmp_path_factory.mktemp("checkpoints"))
    alone = [*WHOLE, *HALF, *ADAPTED]
    found = run([*alone, *first, *then], tiny_models)
    return dict(zip([*alone, *first, *PORTABLE, *GIVEN], found, strict=True))


def hold(cases: list[Case], traces: list[Trace], plain: Plain) -> None:
    errors = {
        case.label: (
            trace.loss_error(plain[case.model, case.kind]),
            trace.weight_error(plain[case.model, case.kind]),
        )
        for case, trace in zip(cases, traces, strict=True)
    }
    beyond = {label: e for label, e in errors.items() if not (e[0] <= LOSS_LIMIT and e[1] <= WEIGHT_LIMIT)}
    assert beyond == {}


def test_the_plain_process_learns(plain: Plain) -> None:
    for trace in plain.values():
        assert len(set(trace.losses)) == len(trace.losses)
    assert plain["deepseek-v3", "full"].losses[-1] < plain["deepseek-v3", "full"].losses[0] - 0.1


def test_losses_and_weights_are_those_of_one_plain_process(traces: Traces, plain: Plain) -> None:
    hold(WHOLE, [traces[case] for case in WHOLE], plain)


def test_adapted_experts_are_those_of_one_process_with_peft(
    traces: Traces, tiny_models: dict[str, Path]
) -> None:
    by_peft = {("deepseek-v3", "lora all"): reference(tiny_models["deepseek-v3"], "lora all")}
    hold(ADAPTED, [traces[case] for case in ADAPTED], by_peft)


def test_bfloat16_gives_nearly_the_same_losses(traces: Traces, plain: Plain) -> None:
    """As on GPUs: without autocast where an engine casts parameters itself, its gradients in float32."""
    errors = {case.label: traces[case].loss_error(plain[case.model, case.kind]) for case in HALF}
    assert {label: error for label, error in errors.items() if not error <= HALF_LOSS_LIMIT} == {}


def test_any_engine_goes_on_from_any_others_checkpoint_at_another_world_size(
    traces: Traces, plain: Plain
) -> None:
    hold([b for _, b in PORTABLE], [traces[pair] for pair in PORTABLE], plain)


def test_settings_of_a_ds_config_change_no_result(traces: Traces, plain: Plain) -> None:
    """Settings that change which rank has which part of the parameters, or another copy of them."""
    hold([b for _, b in GIVEN], [traces[pair] for pair in GIVEN], plain)
