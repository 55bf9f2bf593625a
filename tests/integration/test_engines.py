"""Every engine gives the model that one plain process gives, and goes on from any other's checkpoint.

A part of `make parity` that covers every engine, both kinds, both models, and worlds that do not divide the batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.cases import ENGINES, KINDS, LOSS_LIMIT, MODELS, WEIGHT_LIMIT, Case, Trace, reference
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


def test_any_engine_goes_on_from_any_others_checkpoint_at_another_world_size(
    tiny_models: dict[str, Path], plain: dict[tuple[str, str], Trace], tmp_path: Path
) -> None:
    pairs = [
        (Case(a, KINDS[number % 2], 2, "deepseek-v3"), Case(b, KINDS[number % 2], 3, "deepseek-v3"))
        for number, (a, b) in enumerate(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))
    ]
    traces = saved_then_continued([a for a, _ in pairs], pairs, tiny_models, tmp_path)
    hold([b for _, b in pairs], traces, plain)
