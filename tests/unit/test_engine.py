"""One optimizer step, whatever the engine: the gradient is that of one mean, it is clipped and applied as torch would,
one that is not finite leaves no trace, and the state goes on in any other engine.

Here each engine runs in one process; tests/matrix has them in several.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raytune_ds import catalog, checkpoint, engines
from raytune_ds.catalog import Manifest, ShardFile
from raytune_ds.checkpoint import Reader
from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.data.batch import Batch, collate
from raytune_ds.engines import MOMENTS, Engine, Task, state_shapes
from raytune_ds.engines.adamw import local
from raytune_ds.errors import UserError
from raytune_ds.loop import mean_losses, optimizer_step
from raytune_ds.model.build import Built
from raytune_ds.objectives.sft import sft
from raytune_ds.schedule import lr_multiplier, warmup_steps
from raytune_ds.world import World

VOCABULARY, WIDTH = 20, 6
ALONE = World.alone()
FLOAT, HALF = torch.float32, torch.bfloat16
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "zero", "stage": 1},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3},
}
ALL = list(SETTINGS)
ZERO = [name for name in ALL if name.startswith("zero")]

State = dict[str, torch.Tensor]


every_engine = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module", autouse=True)
def _process() -> Iterator[None]:
    """One thread: toy sizes gain nothing from more. What DeepSpeed puts into the environment goes with this module.

    And each engine of ZeRO 3 has Python look for garbage, which costs a second among all that is loaded by now.
    """
    threads, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


class Block(nn.Module):
    """Where a transformer's layer stands."""

    def __init__(self, dtype: torch.dtype, trained_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=trained_dtype)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=trained_dtype)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden))) * self.frozen


class ToyLM(nn.Module):
    """Stands where a PackedLM does: a batch to the losses of its supervised tokens.

    Attributes:
        spoil: a factor of the embedding's gradient; the others stay as they are.
    """

    def __init__(
        self,
        seed: int = 0,
        dtype: torch.dtype = FLOAT,
        trained_dtype: torch.dtype = FLOAT,
        tied: bool = False,
        unused: tuple[int, ...] = (3,),
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dtype = dtype
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=trained_dtype)
        self.blocks = nn.ModuleList([Block(dtype, trained_dtype) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=trained_dtype)
        self.unused = nn.Parameter(torch.ones(unused, dtype=trained_dtype))  # an expert that gets no token
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))  # no numbers of bfloat16
        self.spoil: float | None = None
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != FLOAT):
            hidden = self.embedding(batch.ids_BT[0, batch.supervised_N])
            spoil = self.spoil
            if spoil is not None:
                hidden.register_hook(lambda gradient: gradient * spoil)
            hidden = hidden * self.scale
            for block in self.blocks:
                hidden = block(hidden.to(self.dtype))
            logits = self.head(hidden).float()
            return F.cross_entropy(logits, batch.targets_N, reduction="none")


def built(seed: int = 0, **how: Any) -> Built:
    """As raytune_ds.model.build makes it: no memory for parameters, buffers in place."""
    real = ToyLM(seed, **how)
    values = {name: parameter.detach().reshape(-1) for name, parameter in real.named_parameters()}
    with torch.device("meta"):
        module = ToyLM(seed, **how)
    module.scale = real.scale.clone()
    return Built(
        module=module,  # type: ignore[arg-type]
        read=lambda name, start, stop: values[name][start:stop],
        blocks=tuple(module.blocks),
        base=SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH)),  # type: ignore[arg-type]
        trained={name: p.shape for name, p in module.named_parameters() if p.requires_grad},
    )


def settings(**values: float | str) -> TrainConfig:
    return TrainConfig(
        **{"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.0, "global_batch": 8, **values}  # type: ignore[arg-type]
    )


def engine_of(
    name: str,
    seed: int = 0,
    accumulation: int = 1,
    dtype: torch.dtype = FLOAT,
    module: dict[str, Any] | None = None,
    **train: float,
) -> Engine:
    """The engine of that name around a ToyLM.

    Args:
        name: see SETTINGS.
        seed: of the initial weights.
        accumulation: micro-batches of a step, which ZeRO counts.
        dtype: what is computed in.
        module: further arguments of ToyLM.
        train: changes to the optimizer's settings.
    """
    if name in ZERO:
        pytest.importorskip("deepspeed")
    config = EngineConfig(**SETTINGS[name])
    task = Task(
        built=built(
            seed, dtype=dtype, trained_dtype=engines.trained_dtype(config.kind, dtype), **(module or {})
        ),
        train=settings(**train),
        engine=config,
        world=ALONE,
        micro_batch=8,
        accumulation=accumulation,
        total_steps=10,
        warmup_steps=0,
    )
    return engines.build(config.kind, task)


def toy(engine: Engine) -> ToyLM:
    """The ToyLM inside."""
    module = engine.module if isinstance(engine.module, ToyLM) else engine.module.module
    assert isinstance(module, ToyLM)
    return module


def state(engine: Engine) -> State:
    """All of the state, flat."""
    found: State = {}
    for piece in engine.pieces():
        assert piece.start == 0
        assert piece.name not in found
        found[piece.name] = piece.tensor.detach().clone()
    return found


def reader(saved: State) -> Callable[[str, int, int], torch.Tensor]:
    return lambda name, start, stop: saved[name][start:stop]


def packs(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Packs of unequal lengths, so micro-batches have unequal weights."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(2, 15, count).tolist():
        ids = rng.integers(0, VOCABULARY, length + 1)
        weights = rng.choice([0.0, 1.0, 0.5], length)
        weights[0] = 1.0
        made.append(
            {
                "ids": ids[:-1],
                "targets": ids[1:],
                "weights": weights,
                "lengths": np.array([length]),
                "docs": np.array([0]),
            }
        )
    return made


def step_of(engine: Engine, step: int = 0, cuts: tuple[int, ...] = (4,), lr: float = 0.01) -> dict[str, Any]:
    """One step on a batch that depends on the step alone."""
    all_packs, ends = packs(sum(cuts), seed=step), np.cumsum(cuts)
    parts = [collate(all_packs[end - size : end]) for end, size in zip(ends, cuts, strict=True)]
    return optimizer_step(engine, sft, parts, ALONE, lr)


def run(engine: Engine, steps: range) -> list[float]:
    """The losses of some steps."""
    return [step_of(engine, step)["loss"] for step in steps]


def assert_same_bits(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: State, expected: State, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


class Plain:
    """The same in a few lines of torch: what every engine is held against."""

    def __init__(self, max_grad_norm: float = 0.0, **module: Any) -> None:
        self.module, self.max_grad_norm = ToyLM(**module), max_grad_norm
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], weight_decay=0.1, fused=False
        )

    def step(self, step: int, count: int, lr: float) -> tuple[float, float]:
        """Loss and norm of one step on all packs at once."""
        batch = collate(packs(count, seed=step))
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        loss = sft(self.module, batch).sum() / batch.weight
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.item(), norm.item()

    def state(self) -> State:
        found = {f"model/{name}": p.detach().reshape(-1).clone() for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = self.optimizer.state[parameter][moment].reshape(-1).clone()
        return found


# ---- the beginning --------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_it_begins_with_the_weights_of_the_model_and_nothing_done(name: str, dtype: torch.dtype) -> None:
    kind = SETTINGS[name]["kind"]
    model = built(dtype=dtype, trained_dtype=engines.trained_dtype(kind, dtype))
    engine = engine_of(name, dtype=dtype)
    expected = {f"model/{n}": model.read(n, 0, shape.numel()).float() for n, shape in model.trained.items()}
    for moment in MOMENTS:
        expected |= {f"{moment}/{n}": torch.zeros(shape.numel()) for n, shape in model.trained.items()}
    found = state(engine)
    assert {tensor.dtype for tensor in found.values()} == {FLOAT}
    assert_same_bits(found, expected)
    assert engine.updates == 0


@every_engine
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_buffers_and_frozen_parameters_stay(name: str, dtype: torch.dtype) -> None:
    engine = engine_of(name, dtype=dtype)
    run(engine, range(2))
    assert torch.equal(toy(engine).scale, torch.linspace(0.5, 1.5, WIDTH)), "in float32"
    for block in toy(engine).blocks:
        frozen = block.frozen
        values = frozen.ds_tensor if name == "zero3" else local(frozen)  # type: ignore[union-attr, arg-type]
        assert torch.equal(values[:WIDTH], torch.linspace(0.5, 1.5, WIDTH, dtype=dtype))
    found = state(engine)
    assert not any("frozen" in key for key in found)
    assert torch.equal(found["model/unused"], torch.ones(3))


# ---- accumulation ---------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("cuts", [(1,) * 8, (3, 5), (1, 7), (2, 0, 6, 0)])
def test_the_step_is_the_same_however_the_batch_is_cut(name: str, cuts: tuple[int, ...]) -> None:
    whole, cut = engine_of(name), engine_of(name, accumulation=len(cuts))
    for step in range(2):
        ends, eight = np.cumsum(cuts), packs(8, seed=step)
        weights = {
            sum(float(pack["weights"].sum()) for pack in eight[end - size : end])
            for end, size in zip(ends, cuts, strict=True)
        }
        assert len(weights) > 1  # a mean of means would differ
        expected, found = step_of(whole, step, (8,)), step_of(cut, step, cuts)
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6)
        assert (found["weight"], found["tokens"]) == (expected["weight"], expected["tokens"])
    assert_close(state(cut), state(whole), rtol=1e-5, atol=1e-7)
    assert (cut.updates, whole.updates) == (2, 2)


def test_the_row_says_what_was_done() -> None:
    eight = packs(8)
    row = step_of(engine_of("ddp"), 0, (3, 5, 0), lr=0.005)
    weights = np.concatenate([pack["weights"] for pack in eight])
    losses = ToyLM()(collate(eight)).detach().numpy()
    assert row["loss"] == pytest.approx((losses * weights[weights != 0]).sum() / weights.sum(), rel=1e-6)
    assert (row["weight"], row["tokens"], row["lr"]) == (weights.sum(), len(weights), 0.005)
    assert row["skipped"] is False


# ---- applying -------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize(("max_grad_norm", "tied"), [(0.0, False), (0.05, False), (1e3, False), (0.05, True)])
def test_steps_equal_plain_torch(name: str, max_grad_norm: float, tied: bool) -> None:
    engine = engine_of(name, accumulation=2, module={"tied": tied}, max_grad_norm=max_grad_norm)
    plain = Plain(max_grad_norm, tied=tied)
    for step in range(4):
        lr = 0.01 / (step + 1)
        row = step_of(engine, step, (3, 1), lr)
        loss, norm = plain.step(step, 4, lr)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["skipped"] is False
        assert engine.updates == step + 1
        assert_close(state(engine), plain.state())


@every_engine
def test_a_parameter_that_took_no_part_has_a_gradient_of_zero(name: str) -> None:
    engine, plain = engine_of(name, module={"unused": (3, 2)}), Plain(unused=(3, 2))
    for step in range(2):
        step_of(engine, step)
        plain.step(step, 4, 0.01)
    assert_close(state(engine), plain.state())
    assert state(engine)["model/unused"].max() < 1, "it decays"


@every_engine
def test_a_gradient_within_the_limit_is_left_as_it_is(name: str) -> None:
    free = engine_of(name)
    norm = step_of(free)["grad_norm"]
    limited = engine_of(name, max_grad_norm=1.5 * norm)
    step_of(limited)
    assert_same_bits(state(limited), state(free))


@every_engine
def test_the_gradient_is_cleared_after_a_step(name: str) -> None:
    engine = engine_of(name, accumulation=2)
    step_of(engine, 0, (2, 2))
    before = state(engine)
    for _ in range(2):
        engine.backward(sft(engine.module, collate(packs(2))).sum() * 0.0)
    result = engine.step(0.01)
    assert result.grad_norm == 0
    after = state(engine)
    for key in before:
        if key.startswith("exp_avg/"):
            torch.testing.assert_close(after[key], before[key] * 0.9, rtol=1e-6, atol=0)


@every_engine
def test_a_rate_of_zero_changes_the_moments_alone(name: str) -> None:
    engine, plain = engine_of(name), Plain()
    for step, lr in enumerate((0.0, 0.01, 0.0, 0.01)):
        before = state(engine)
        step_of(engine, step, lr=lr)
        plain.step(step, 4, lr)
        after = state(engine)
        changed = {key.partition("/")[0] for key in after if not torch.equal(after[key], before[key])}
        assert changed == ({*MOMENTS, "model"} if lr else {*MOMENTS})
    assert engine.updates == 4
    assert_close(state(engine), plain.state())


@every_engine
def test_evaluation_changes_nothing(name: str) -> None:
    engine, other, plain = engine_of(name), engine_of(name), Plain()
    held_out = [[collate(packs(3, seed=8))], [collate(packs(2, seed=9)), collate([])]]
    for step in range(3):
        loss = mean_losses(engine.module, sft, held_out, ALONE)
        assert loss == pytest.approx(mean_losses(plain.module, sft, held_out, ALONE), rel=1e-4)
        assert engine.module.training
        assert step_of(engine, step) == step_of(other, step)
        plain.step(step, 4, 0.01)
    assert_same_bits(state(engine), state(other))


# ---- what is not finite ---------------------------------------------------------------------------

POISONS = [float("nan"), float("inf"), -float("inf")]


def poisoned(engine: Engine, factors: list[float | None]) -> None:
    """Gradients of which some are not finite: a micro-batch each, its factor of the embedding's gradient."""
    for number, factor in enumerate(factors):
        toy(engine).spoil = factor
        engine.backward(sft(engine.module, collate(packs(2, seed=number))).sum() / 10)
    toy(engine).spoil = None


@every_engine
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("poison", POISONS)
def test_a_gradient_that_is_not_finite_leaves_no_trace(name: str, poison: float, before: int) -> None:
    engine, untouched = engine_of(name, max_grad_norm=0.5), engine_of(name, max_grad_norm=0.5)
    run(engine, range(before)), run(untouched, range(before))
    saved = state(engine)
    for _ in range(2):
        engine.backward(sft(engine.module, collate(packs(2))).sum() * poison)
        result = engine.step(0.01)
        assert result.skipped is True
        assert not np.isfinite(result.grad_norm)
        assert_same_bits(state(engine), saved)
        assert engine.updates == before
    # And nothing of it is left: the next steps are as if it had not been.
    following = range(before, before + 2)
    assert [step_of(engine, s) for s in following] == [step_of(untouched, s) for s in following]
    assert_same_bits(state(engine), state(untouched))
    assert engine.updates == before + 2


@every_engine
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_micro_batch_and_one_parameter_are_enough(name: str, place: int, dtype: torch.dtype) -> None:
    how: dict[str, Any] = {"accumulation": 3, "dtype": dtype}
    engine, untouched = engine_of(name, **how), engine_of(name, **how)
    for made in (engine, untouched):
        step_of(made, 0, (1, 2, 1))
    saved = state(engine)
    poisoned(engine, [float("inf") if number == place else None for number in range(3)])
    result = engine.step(0.01)
    assert result.skipped is True
    assert_same_bits(state(engine), saved)
    for step in (1, 2):
        assert step_of(engine, step, (1, 2, 1)) == step_of(untouched, step, (1, 2, 1))
    assert_same_bits(state(engine), state(untouched))


@every_engine
def test_a_norm_that_is_not_finite_is_enough(name: str) -> None:
    engine = engine_of(name)
    run(engine, range(2))
    saved = state(engine)
    engine.backward(sft(engine.module, collate(packs(2))).sum() * 1e25)
    assert engine.step(0.01).skipped is True
    assert_same_bits(state(engine), saved)


@every_engine
@pytest.mark.parametrize("before", [0, 2])
def test_a_gradient_that_is_not_wanted_leaves_no_trace(name: str, before: int) -> None:
    engine, untouched = engine_of(name, max_grad_norm=0.5), engine_of(name, max_grad_norm=0.5)
    run(engine, range(before)), run(untouched, range(before))
    saved = state(engine)
    engine.backward(sft(engine.module, collate(packs(2))).sum())
    result = engine.step(0.01, wanted=False)
    assert result.skipped is True
    assert np.isfinite(result.grad_norm)
    assert_same_bits(state(engine), saved)
    assert engine.updates == before
    following = range(before, before + 2)
    assert [step_of(engine, s) for s in following] == [step_of(untouched, s) for s in following]
    assert_same_bits(state(engine), state(untouched))


@every_engine
def test_a_step_whose_loss_is_too_high_is_skipped_and_a_lower_one_is_not(name: str) -> None:
    engine = engine_of(name)
    loss = step_of(engine)["loss"]
    saved = state(engine)
    batches = [collate(packs(4, seed=0))]
    row = optimizer_step(engine, sft, batches, ALONE, 0.01, highest_loss=loss / 2)
    assert (row["skipped"], row["loss"]) == (True, pytest.approx(loss, rel=0.2))
    assert_same_bits(state(engine), saved)
    assert optimizer_step(engine, sft, batches, ALONE, 0.01, highest_loss=loss * 2)["skipped"] is False
    assert engine.updates == 2


@every_engine
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(name: str) -> None:
    def shifted(module: nn.Module, batch: Batch) -> torch.Tensor:
        return sft(module, batch) + float("inf")

    engine = engine_of(name)
    saved = state(engine)
    row = optimizer_step(engine, shifted, [collate(packs(2))], ALONE, 0.01)
    assert row["skipped"] is True
    assert np.isfinite(row["grad_norm"])
    assert_same_bits(state(engine), saved)


@every_engine
def test_what_was_saved_can_be_loaded_in_the_midst_of_training(name: str) -> None:
    """As a run does that goes back: the steps after it are the same once more."""
    engine = engine_of(name)
    run(engine, range(2))
    saved, losses = state(engine), run(engine, range(2, 4))
    engine.backward(sft(engine.module, collate(packs(2))).sum() * float("nan"))
    assert engine.step(0.01).skipped is True
    engine.load(reader(saved), 2)
    assert run(engine, range(2, 4)) == losses


@every_engine
def test_a_large_gradient_is_applied(name: str) -> None:
    engine = engine_of(name, max_grad_norm=1.0)
    engine.backward(sft(engine.module, collate(packs(2))).sum() * 1e10)
    result = engine.step(0.01)
    assert result.skipped is False
    assert 1e9 < result.grad_norm < float("inf")
    assert all(bool(tensor.isfinite().all()) for tensor in state(engine).values())
    assert engine.updates == 1


@every_engine
def test_a_step_is_reported_as_skipped(name: str) -> None:
    def spoiled(module: nn.Module, batch: Batch) -> torch.Tensor:
        return sft(module, batch) * float("nan")

    row = optimizer_step(engine_of(name), spoiled, [collate(packs(2))], ALONE, 0.01)
    assert row["skipped"] is True
    assert not np.isfinite(row["grad_norm"])


# ---- state ----------------------------------------------------------------------------------------


@every_engine
def test_pieces_are_the_state_itself(name: str) -> None:
    engine = engine_of(name)
    run(engine, range(1))
    taken = {piece.name: piece.tensor for piece in engine.pieces()}
    run(engine, range(1, 2))
    assert_same_bits({key: tensor.detach().clone() for key, tensor in taken.items()}, state(engine))


@every_engine
@pytest.mark.parametrize("before", [0, 3])
def test_a_loaded_state_goes_on_bit_for_bit(name: str, before: int) -> None:
    straight = engine_of(name, max_grad_norm=0.5)
    run(straight, range(before))
    saved = state(straight)
    losses = run(straight, range(before, before + 3))

    resumed = engine_of(name, seed=1, max_grad_norm=0.5)
    resumed.load(reader(saved), before)
    assert resumed.updates == before
    assert_same_bits(state(resumed), saved)
    assert run(resumed, range(before, before + 3)) == losses
    assert_same_bits(state(resumed), state(straight))


@every_engine
def test_a_load_leaves_nothing_of_what_was_there_before(name: str) -> None:
    straight, other = engine_of(name), engine_of(name, seed=1)
    run(straight, range(2))
    saved = state(straight)
    run(other, range(5, 9))
    other.load(reader(saved), 2)
    assert other.updates == 2
    assert run(other, range(2, 4)) == run(straight, range(2, 4))
    assert_same_bits(state(other), state(straight))


@every_engine
def test_a_load_after_an_evaluation_is_computed_with(name: str) -> None:
    straight, other = engine_of(name), engine_of(name, seed=1)
    run(straight, range(2))
    held_out = [[collate(packs(3, seed=8))]]
    mean_losses(other.module, sft, held_out, ALONE)
    other.load(reader(state(straight)), 2)
    assert mean_losses(other.module, sft, held_out, ALONE) == mean_losses(
        straight.module, sft, held_out, ALONE
    )
    assert run(other, range(2, 4)) == run(straight, range(2, 4))


@every_engine
def test_the_number_of_updates_counts(name: str) -> None:
    engine, plain = engine_of(name), Plain()
    for step in range(2):
        step_of(engine, step)
        plain.step(step, 4, 0.01)
    engine.load(reader(state(engine)), 50)
    for values in plain.optimizer.state.values():
        values["step"].fill_(50)
    step_of(engine, 2)
    plain.step(2, 4, 0.01)
    assert engine.updates == 51
    assert_close(state(engine), plain.state())


@every_engine
def test_a_loaded_state_is_a_copy(name: str) -> None:
    engine = engine_of(name)
    run(engine, range(2))
    saved = state(engine)
    kept = {key: tensor.clone() for key, tensor in saved.items()}
    other = engine_of(name, seed=1)
    other.load(reader(saved), 2)
    run(other, range(2, 4))
    assert_same_bits(saved, kept)


@every_engine
def test_in_bfloat16_the_state_is_float32_and_what_is_computed_with_follows_it(name: str) -> None:
    saved_by = engine_of("ddp")
    run(saved_by, range(3))
    saved, batch = state(saved_by), [[collate(packs(4, seed=5))]]
    engine = engine_of(name, seed=1, dtype=HALF)
    engine.load(reader(saved), 3)
    assert_same_bits(state(engine), saved)
    expected = mean_losses(saved_by.module, sft, batch, ALONE)
    assert mean_losses(engine.module, sft, batch, ALONE) == pytest.approx(expected, rel=0.02)
    assert mean_losses(ToyLM(seed=1), sft, batch, ALONE) != pytest.approx(expected, rel=0.05)
    # Steps far below bfloat16's resolution add up.
    for step in range(3, 6):
        step_of(engine, step, lr=1e-5)
        step_of(saved_by, step, lr=1e-5)
    for key, tensor in state(saved_by).items():
        if key.startswith("model/"):
            torch.testing.assert_close(state(engine)[key], tensor, rtol=0, atol=3e-5)
            assert key == "model/unused" or not torch.equal(state(engine)[key], saved[key])


# ---- checkpoints ----------------------------------------------------------------------------------


def write(path: Path, parts: list[Engine], model: Built, updates: int) -> Reader:
    """A checkpoint that `parts` write, a rank each."""
    files: list[ShardFile] = []
    for rank, engine in enumerate(parts):
        files += checkpoint.write_shards(str(path), rank, engine.pieces())
    catalog.write_manifest(
        str(path), Manifest(updates, updates, {}, {}, None, state_shapes(model.trained), tuple(files))
    )
    return Reader(str(path), checkpoint.verify(str(path), ALONE))


class AsRank:
    """A ddp engine that hands out what it would on some rank: that takes no process group."""

    def __init__(self, engine: Engine, rank: int, size: int) -> None:
        self._engine, self._world = engine, World(rank, size, torch.device("cpu"))

    def pieces(self) -> list[Any]:
        alone = self._engine._world  # type: ignore[attr-defined]
        self._engine._world = self._world  # type: ignore[attr-defined]
        found = list(self._engine.pieces())
        self._engine._world = alone  # type: ignore[attr-defined]
        return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 200])
def test_the_ranks_shares_make_the_whole(tmp_path: Path, size: int) -> None:
    engine, model = engine_of("ddp"), built()
    run(engine, range(2))
    ranks: list[Any] = [AsRank(engine, rank, size) for rank in range(size)]
    counts = {name: torch.zeros(tensor.numel()) for name, tensor in state(engine).items()}
    sizes = []
    for rank in ranks:
        sizes.append(sum(piece.tensor.numel() for piece in rank.pieces()))
        for piece in rank.pieces():
            assert piece.tensor.numel() > 0
            counts[piece.name][piece.start : piece.start + piece.tensor.numel()] += 1
    assert all(bool((count == 1).all()) for count in counts.values())
    # No rank has more to write than another, but for what can't be divided.
    assert max(sizes) - min(sizes) <= len(counts)
    read = write(tmp_path, ranks, model, 2)
    assert {name: list(shape) for name, shape in read.shapes.items()} == state_shapes(model.trained)
    assert_same_bits({name: read.whole(name).reshape(-1) for name in read.shapes}, state(engine))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reader]:
    """A checkpoint of three steps that each engine wrote."""
    made: dict[str, Reader] = {}

    def of(name: str) -> Reader:
        if name not in made:
            engine = engine_of(name, max_grad_norm=0.5)
            run(engine, range(3))
            made[name] = write(tmp_path_factory.mktemp("saved") / name, [engine], built(), 3)
        return made[name]

    return of


@every_engine
@pytest.mark.parametrize("writer", ALL)
def test_any_engine_goes_on_from_any_others_checkpoint(
    name: str, writer: str, checkpoints: Callable[[str], Reader]
) -> None:
    plain = Plain(max_grad_norm=0.5)
    for step in range(3):
        plain.step(step, 4, 0.01)
    engine = engine_of(name, seed=1, max_grad_norm=0.5)
    engine.load(checkpoints(writer), 3)
    assert_close(state(engine), plain.state())
    for step in range(3, 6):
        row = step_of(engine, step)
        loss, norm = plain.step(step, 4, 0.01)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert engine.updates == 6
    assert_close(state(engine), plain.state())


def refusal(changes: dict[str, list[int] | None]) -> str:
    """What is said of a checkpoint whose shapes differ in `changes`; None: it does not have that tensor."""
    from raytune_ds.worker import _require_same_parameters

    model = built()
    found = {
        name: shape for name, shape in {**state_shapes(model.trained), **changes}.items() if shape is not None
    }
    manifest = Manifest(1, 1, {}, {}, None, found, ())
    with pytest.raises(UserError) as caught:
        _require_same_parameters(model, Reader("", manifest))
    return str(caught.value)


def test_the_state_of_another_model_is_refused_by_name() -> None:
    from raytune_ds.worker import _require_same_parameters

    _require_same_parameters(
        built(), Reader("", Manifest(1, 1, {}, {}, None, state_shapes(built().trained), ()))
    )
    message = refusal({"model/embedding.weight": [20, 7]})
    assert "model/embedding.weight: [20, 7] there, [20, 6] here" in message
    assert "unused" not in message
    assert "exp_avg/head.bias: not in the checkpoint" in refusal({"exp_avg/head.bias": None})
    assert "model/other.weight: in the checkpoint only" in refusal({"model/other.weight": [1]})


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


def test_the_rate_begins_with_zero_where_there_is_a_warm_up() -> None:
    multiplier = lr_multiplier(settings(lr_scheduler_type="linear", warmup_steps=4), 12)
    assert [multiplier(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"warmup_ratio": 0.25}, 10), ({"warmup_steps": 0, "warmup_ratio": 0.5}, 0), ({"warmup_steps": 7}, 7)],
)
def test_the_length_of_the_warm_up(given: dict[str, float], expected: int) -> None:
    assert warmup_steps(settings(**given), 40) == expected
