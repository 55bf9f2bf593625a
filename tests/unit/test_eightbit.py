"""AdamW with moments in 8 bits: a step like torch's, and a state that leaves and comes back as float32."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from raytune_ds.config import TrainConfig
from raytune_ds.engines import MOMENTS
from raytune_ds.engines.adamw import AdamW
from raytune_ds.engines.eightbit import EightBitAdamW, adamw_of

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("bitsandbytes")

SHAPES = {"large": (64, 128), "small": (3, 5), "vector": (7,)}


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def made(optim: str) -> AdamW:
    return adamw_of(parameters(), TrainConfig(optim=optim, weight_decay=0.1, learning_rate=1e-2))


def gradients(step: int) -> Iterator[torch.Tensor]:
    torch.manual_seed(step + 1)
    for shape in SHAPES.values():
        yield torch.randn(shape)


def step(adamw: AdamW, number: int) -> None:
    given = list(gradients(number))
    for parameter, gradient in zip(adamw.parameters.values(), given, strict=True):
        parameter.grad = gradient
    norm = math.sqrt(sum(float(g.square().sum()) for g in given))
    assert not adamw.apply(given, norm, 1e-2, wanted=True).skipped


def state(adamw: AdamW) -> dict[tuple[str, str], torch.Tensor]:
    return {(kind, name): tensor.clone() for kind, name, tensor in adamw.state()}


def load(adamw: AdamW, values: dict[tuple[str, str], torch.Tensor], updates: int) -> None:
    def write(tensor: torch.Tensor, kind: str, name: str) -> None:
        tensor.copy_(values[kind, name])

    adamw.load(write, updates)


def test_the_name_says_which() -> None:
    assert type(made("adamw_torch")) is AdamW
    assert type(made("adamw_8bit")) is EightBitAdamW
    assert TrainConfig(optim="adamw_bnb_8bit").optim == "adamw_8bit"


def test_it_goes_where_that_of_torch_goes() -> None:
    ours, theirs = made("adamw_8bit"), made("adamw_torch")
    start = state(ours)
    for number in range(10):
        step(ours, number)
        step(theirs, number)
    for key, value in state(theirs).items():
        found = state(ours)[key]
        moved = (value - start[key]).norm()
        # bitsandbytes keeps small moments in float32.
        limit = 0.05 if key[1] == "large" else 1e-5
        assert (found - value).norm() < limit * moved, key
    assert ours.updates == 10


def test_the_moments_are_bytes() -> None:
    ours = made("adamw_8bit")
    assert isinstance(ours, EightBitAdamW)
    held = ours._optimizer.state[ours._parts["large"]]
    assert {held["state1"].dtype, held["state2"].dtype} == {torch.uint8}


def test_a_state_comes_back_to_the_bit_and_goes_on_alike() -> None:
    one = made("adamw_8bit")
    assert {t.dtype for t in state(one).values()} == {torch.float32}  # and it is whole before the first step
    for number in range(5):
        step(one, number)
    saved = state(one)
    other = made("adamw_8bit")
    load(other, saved, 5)
    assert other.updates == 5
    for key, value in saved.items():
        assert torch.equal(state(other)[key], value), key
    assert not any(
        value.signbit().any() for (kind, _), value in state(made("adamw_8bit")).items() if kind in MOMENTS
    )
    for number in range(5, 8):
        step(one, number)
        step(other, number)
    for key, value in state(one).items():
        assert torch.equal(state(other)[key], value), key


@pytest.mark.parametrize(("first", "then"), [("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch")])
def test_either_goes_on_from_the_other(first: str, then: str) -> None:
    one, same, other = made(first), made(first), made(then)
    for number in range(5):
        step(one, number)
    saved = state(one)
    load(same, saved, 5)
    load(other, saved, 5)
    assert saved[MOMENTS[0], "large"].any()
    step(same, 5)
    step(other, 5)
    for name in SHAPES:
        moved = (state(same)["model", name] - saved["model", name]).norm()
        assert (state(other)["model", name] - state(same)["model", name]).norm() < 0.1 * moved, name
