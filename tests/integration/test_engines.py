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
from tests.matrix.run import run, saved_then_continued

NAMES = list(ENGINES)


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, Path]) -> dict[tuple[str, str], Trace]:
    return {(model, kind): reference(tiny_models[model], kind) for model in MODELS for kind in KINDS}


def hold(cases: list[Case], traces: list[Trace], plain: dict[tuple[str, str], Trace]) -> None:
    errors = {
        case.label: (
            trace.loss_error(plain[case.model, case.kind]),
            trace.weight_error(plain[case.model, case.kind]),
        )
        for case, trace in zip(cases, traces, strict=True)
    }
    beyond = {label: e for label, e in errors.items() if not (e[0] <= LOSS_LIMIT and e[1] <= WEIGHT_LIMIT)}
    assert beyond == {}


def test_the_plain_process_learns(plain: dict[tuple[str, str], Trace]) -> None:
    for trace in plain.values():
        assert len(set(trace.losses)) == len(trace.losses)
    assert plain["deepseek-v3", "full"].losses[-1] < plain["deepseek-v3", "full"].losses[0] - 0.1


def test_losses_and_weights_are_those_of_one_plain_process(
    tiny_models: dict[str, Path], plain: dict[tuple[str, str], Trace]
) -> None:
    cases = [
        Case(engine, kind, 3, MODELS[(number + shift) % 2])
        for number, engine in enumerate(NAMES)
        for shift, kind in enumerate(KINDS)
    ]
    hold(cases, run(cases, tiny_models), plain)


def test_adapted_experts_are_those_of_one_process_with_peft(tiny_models: dict[str, Path]) -> None:
    by_peft = {("deepseek-v3", "lora all"): reference(tiny_models["deepseek-v3"], "lora all")}
    cases = [Case(engine, "lora all", 2, "deepseek-v3") for engine in ("ddp", "zero2", "zero3", "fsdp")]
    hold(cases, run(cases, tiny_models), by_peft)


def test_bfloat16_gives_nearly_the_same_losses(
    tiny_models: dict[str, Path], plain: dict[tuple[str, str], Trace]
) -> None:
    """As on GPUs: without autocast where an engine casts parameters itself, its gradients in float32."""
    cases = [
        Case(engine, kind, 2, "deepseek-v3", dtype="bfloat16")
        for engine in ("ddp", "zero2", "zero3", "fsdp")
        for kind in KINDS
    ]
    traces = run(cases, tiny_models)
    errors = {c.label: t.loss_error(plain[c.model, c.kind]) for c, t in zip(cases, traces, strict=True)}
    assert {label: error for label, error in errors.items() if not error <= HALF_LOSS_LIMIT} == {}


def test_any_engine_goes_on_from_any_others_checkpoint_at_another_world_size(
    tiny_models: dict[str, Path], plain: dict[tuple[str, str], Trace], tmp_path: Path
) -> None:
    pairs = [
        (Case(a, KINDS[number % 2], 2, "deepseek-v3"), Case(b, KINDS[number % 2], 3, "deepseek-v3"))
        for number, (a, b) in enumerate(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))
    ]
    traces = saved_then_continued([a for a, _ in pairs], pairs, tiny_models, tmp_path)
    hold([b for _, b in pairs], traces, plain)


def test_settings_of_a_ds_config_change_no_result(
    tiny_models: dict[str, Path], plain: dict[tuple[str, str], Trace], tmp_path: Path
) -> None:
    """Settings that change which rank has which part of the parameters, or another copy of them."""
    round_robin = '{"zero_optimization": {"round_robin_gradients": true}}'
    secondary = '{"zero_optimization": {"zero_hpz_partition_size": 2}}'
    first = [Case("zero2", "full", 2, "qwen2", given=round_robin), Case("zero3", "full", 2, "qwen2")]
    then = [Case("ddp", "full", 2, "qwen2"), Case("zero3", "full", 2, "qwen2", given=secondary)]
    pairs = list(zip(first, then, strict=True))
    hold(then, saved_then_continued(first, pairs, tiny_models, tmp_path), plain)
