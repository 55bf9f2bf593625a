"""One optimizer step: the gradient is that of one mean, it is clipped and applied as torch would, and it resumes."""

from __future__ import annotations

import copy
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raytune_ds import engines
from raytune_ds.config import TrainConfig
from raytune_ds.data.batch import Batch, collate
from raytune_ds.engines import Engine
from raytune_ds.errors import UserError
from raytune_ds.loop import optimizer_step
from raytune_ds.objectives.sft import sft
from raytune_ds.schedule import lr_multiplier
from raytune_ds.world import World

VOCABULARY, WIDTH = 20, 6
ALONE = World.alone()


class ToyLM(nn.Module):
    """Stands where a PackedLM does: a batch to the losses of its supervised tokens."""

    def __init__(self, seed: int = 0, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.unused = nn.Parameter(torch.ones(3))  # an expert that gets no token
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        supervised = batch.weights_BT != 0
        hidden = self.norm(self.embedding(batch.ids_BT[supervised]))
        return F.cross_entropy(self.head(hidden), batch.targets_BT[supervised], reduction="none")


def packs(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Packs of unequal lengths, so micro-batches have unequal weights."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(2, 15, count).tolist():
        ids = rng.integers(0, VOCABULARY, length + 1)
        weights = rng.choice([0.0, 1.0, 0.5], length)
        weights[0] = 1.0
        made.append({"ids": ids[:-1], "targets": ids[1:], "weights": weights, "lengths": np.array([length])})
    return made


def settings(**values: float | str) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.0, **values})  # type: ignore[arg-type]


def engine_of(module: nn.Module, **values: float | str) -> Engine:
    return engines.build("auto", module, settings(**values), ALONE)


def parameters(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def run(engine: Engine, steps: range, lr: float = 0.01) -> list[float]:
    """Some steps on batches that depend on the step alone; their losses."""
    return [optimizer_step(engine, sft, [collate(packs(4, seed=step))], ALONE, lr)["loss"] for step in steps]


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1] * 8, [3, 5], [1, 7], [2, 0, 6, 0]])
def test_the_step_is_the_same_however_the_batch_is_cut(cuts: list[int]) -> None:
    eight = packs(8)
    whole, cut = engine_of(ToyLM()), engine_of(ToyLM())
    expected = optimizer_step(whole, sft, [collate(eight)], ALONE, 0.01)
    ends = np.cumsum(cuts)
    micro_batches = [collate(eight[end - size : end]) for end, size in zip(ends, cuts, strict=True)]
    weights = {float(batch.weight) for batch in micro_batches}
    assert len(weights) > 1  # a mean of means would differ
    found = optimizer_step(cut, sft, micro_batches, ALONE, 0.01)
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)
    assert (found["weight"], found["tokens"]) == (expected["weight"], expected["tokens"])
    for name, parameter in parameters(whole).items():
        torch.testing.assert_close(parameters(cut)[name], parameter, rtol=1e-5, atol=1e-7)


def test_the_row_says_what_was_done() -> None:
    eight = packs(8)
    row = optimizer_step(
        engine_of(ToyLM()), sft, [collate(eight[:3]), collate(eight[3:]), collate([])], ALONE, 0.005
    )
    weights = np.concatenate([pack["weights"] for pack in eight])
    losses = ToyLM()(collate(eight)).detach().numpy()
    assert row["loss"] == pytest.approx((losses * weights[weights != 0]).sum() / weights.sum(), rel=1e-6)
    assert (row["weight"], row["tokens"], row["lr"]) == (weights.sum(), len(weights), 0.005)
    assert row["skipped"] is False


# ---- applying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e3])
def test_steps_equal_plain_torch(max_grad_norm: float) -> None:
    engine = engine_of(ToyLM(), max_grad_norm=max_grad_norm)
    reference = ToyLM()
    matrices = [p for p in reference.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], weight_decay=0.1, fused=False
    )
    for step in range(4):
        batch, lr = collate(packs(4, seed=step)), 0.01 / (step + 1)
        row = optimizer_step(engine, sft, [batch], ALONE, lr)
        optimizer.zero_grad()
        (sft(reference, batch) / batch.weight).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm or float("inf"))
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(parameters(engine)[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_a_gradient_within_the_limit_is_left_as_it_is() -> None:
    batch = collate(packs(4))
    free = engine_of(ToyLM())
    norm = optimizer_step(free, sft, [batch], ALONE, 0.01)["grad_norm"]
    limited = engine_of(ToyLM(), max_grad_norm=1.5 * norm)
    optimizer_step(limited, sft, [batch], ALONE, 0.01)
    assert_same_bits(limited.state(), free.state())


def test_the_gradient_is_cleared_after_a_step() -> None:
    once, twice = engine_of(ToyLM(), weight_decay=0.0), engine_of(ToyLM(), weight_decay=0.0)
    (first,) = run(once, range(1))
    assert run(twice, range(1)) == [first]
    assert all(not p.grad.any() for p in twice.module.parameters() if p.grad is not None)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(poison: float) -> None:
    engine, untouched = engine_of(ToyLM()), engine_of(ToyLM())
    run(engine, range(2)), run(untouched, range(2))
    before = copy.deepcopy(engine.state())
    engine.backward(engine.module.head.weight.sum() * poison)  # type: ignore[union-attr, operator]
    result = engine.step(0.01)
    assert result.skipped
    assert not np.isfinite(result.grad_norm)
    assert_same_bits(engine.state(), before)
    # And nothing of it is left: the next step is as if it had not been.
    assert run(engine, range(2, 4)) == run(untouched, range(2, 4))
    assert_same_bits(engine.state(), untouched.state())


def test_a_step_is_reported_as_skipped() -> None:
    def poisoned(module: nn.Module, batch: Batch) -> torch.Tensor:
        return sft(module, batch) * float("nan")

    row = optimizer_step(engine_of(ToyLM()), poisoned, [collate(packs(2))], ALONE, 0.01)
    assert row["skipped"] is True


def test_frozen_parameters_stay_and_have_no_state() -> None:
    engine = engine_of(ToyLM())
    run(engine, range(2))
    assert torch.equal(parameters(engine)["frozen"], torch.ones(3))
    assert not any("frozen" in name for name in engine.state())
    assert torch.equal(parameters(engine)["unused"], torch.ones(3))


# ---- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 3])
def test_a_loaded_state_goes_on_bit_for_bit(before: int) -> None:
    straight = engine_of(ToyLM(), max_grad_norm=0.5)
    run(straight, range(before))
    saved = copy.deepcopy(straight.state())
    losses = run(straight, range(before, before + 3))

    resumed = engine_of(ToyLM(seed=1), max_grad_norm=0.5)
    resumed.load_state(saved.__getitem__, {name: tensor.shape for name, tensor in saved.items()})
    assert_same_bits(resumed.state(), saved)
    assert run(resumed, range(before, before + 3)) == losses
    assert_same_bits(resumed.state(), straight.state())


def test_a_loaded_state_is_a_copy() -> None:
    engine = engine_of(ToyLM())
    run(engine, range(2))
    saved = copy.deepcopy(engine.state())
    kept = copy.deepcopy(saved)
    other = engine_of(ToyLM(seed=1))
    other.load_state(saved.__getitem__, {name: tensor.shape for name, tensor in saved.items()})
    run(other, range(2, 4))
    assert_same_bits(saved, kept)


def test_the_ranks_shares_make_the_whole() -> None:
    whole = engine_of(ToyLM())
    run(whole, range(1))
    expected = whole.state()
    shares = []
    for rank in range(3):
        # Only what a rank hands out depends on its place; no process group is needed for that.
        whole._world = World(rank, 3, torch.device("cpu"))  # type: ignore[attr-defined]
        shares.append(whole.state())
    assert sum(len(share) for share in shares) == len(expected)
    assert_same_bits({name: t for share in shares for name, t in share.items()}, expected)
    assert all(shares)


def refusal(saved: dict[str, torch.Tensor]) -> str:
    engine = engine_of(ToyLM(seed=1))
    before = copy.deepcopy(engine.state())
    with pytest.raises(UserError) as caught:
        engine.load_state(saved.__getitem__, {name: tensor.shape for name, tensor in saved.items()})
    assert_same_bits(engine.state(), before)
    return str(caught.value)


def test_the_state_of_another_model_is_refused_by_name() -> None:
    saved = engine_of(ToyLM(width=WIDTH + 1)).state()
    message = refusal(saved)
    assert "model/embedding.weight: [20, 7] there, [20, 6] here" in message
    assert "unused" not in message

    missing = engine_of(ToyLM()).state()
    del missing["model/head.bias"]
    assert "model/head.bias: not in the checkpoint" in refusal(missing)

    foreign = engine_of(ToyLM()).state() | {"model/other.weight": torch.ones(1)}
    assert "model/other.weight: in the checkpoint only" in refusal(foreign)


# ---- the learning rate ----------------------------------------------------------------------------

TYPES = get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.2}, {"warmup_steps": 7}, {"warmup_steps": 0}])
def test_the_rate_is_that_of_transformers(kind: str, warmup: dict[str, float]) -> None:
    from transformers import get_scheduler

    total, peak = 30, 2e-4
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=peak)
    num_warmup = int(warmup.get("warmup_steps", 0.2 * total))
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=num_warmup, num_training_steps=total)
    multiplier = lr_multiplier(settings(lr_scheduler_type=kind, learning_rate=peak, **warmup), total)
    for step in range(total):
        assert peak * multiplier(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()
