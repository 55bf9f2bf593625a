"""How much is computed at once: the fastest that fits, the same on all ranks and after a restart, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytune_ds import memory
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import Config, EngineConfig, ModelConfig
from raytune_ds.console import human_bytes
from raytune_ds.engines.choose import Choice, Sizes
from raytune_ds.errors import UserError
from raytune_ds.memory import (
    DEPTHS,
    Cut,
    Situation,
    busy_packs,
    decide,
    evenly,
    fitted,
    held_bytes,
    looked_after,
)
from raytune_ds.model.build import Built, build
from raytune_ds.model.footprint import foreseen, gathered
from raytune_ds.rundir import RunDir
from raytune_ds.world import World
from tests.ranks import on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 1 << 30

# ---- the decision ----------------------------------------------------------------------------------

PER_PACK = {"none": 100, "every-4": 80, "every-3": 73, "every-2": 60, "full": 20}


def needs(depth: str, packs: int) -> int:
    """A state of 1,000, and activations."""
    return 1000 + PER_PACK[depth] * packs


def decided(room: float, share: int = 16, busy: int = 4, most: int = 16, **others: Any) -> tuple[str, int]:
    settings: dict[str, Any] = {"depths": DEPTHS, "asked": None, "needs": needs, **others}
    return decide(share=share, busy=busy, most=most, room=room, **settings)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (10_000, ("none", 16)),
        (2600, ("none", 16)),
        (2599, ("none", 8)),  # 15 fit, and 15 and 1 would be no faster than 8 and 8
        (1800, ("none", 8)),
        (1799, ("none", 6)),
        (1400, ("none", 4)),
        (1399, ("every-4", 4)),
        (1320, ("every-4", 4)),
        (1319, ("every-3", 4)),
        (1291, ("every-2", 4)),
        (1239, ("full", 8)),  # 11 fit
        (1080, ("full", 4)),
        (1079, ("full", 3)),
        (1020, ("full", 1)),
        (1019, ("full", 1)),  # nothing fits
        (0, ("full", 1)),
    ],
)
def test_the_fastest_depth_that_keeps_the_hardware_busy_then_as_many_packs_as_fit(
    room: float, expected: tuple[str, int]
) -> None:
    assert decided(room) == expected


def test_tokens_that_keep_hardware_busy_are_packs_and_one_at_least() -> None:
    assert [busy_packs(seq_len, torch.device("cuda")) for seq_len in (512, 2048, 8192, 32768)] == [
        16,
        4,
        1,
        1,
    ]


def test_what_keeps_a_cpu_busy_is_enough_for_it() -> None:
    assert decided(10_000, most=4) == ("none", 4)
    assert decided(1399, most=4) == ("every-4", 4)


@pytest.mark.parametrize(
    ("asked", "room", "depth"), [(2, 1200, "none"), (2, 1199, "every-4"), (16, 1000, "full")]
)
def test_a_number_of_packs_that_is_given_is_kept(asked: int, room: float, depth: str) -> None:
    assert decided(room, asked=asked) == (depth, asked)


def test_a_depth_that_is_given_is_kept() -> None:
    for depth in DEPTHS:
        for room in (10_000, 1000):
            assert decided(room, depths=(depth,))[0] == depth
    assert decided(1399, depths=("none",)) == ("none", 3)


def test_nobody_computes_more_than_a_share() -> None:
    assert decided(10_000, share=3) == ("none", 3)
    assert decided(10_000, share=3, asked=8) == ("none", 3)
    assert decided(1300, share=1) == ("none", 1)
    measured = set[int]()

    def watched(depth: str, packs: int) -> int:
        measured.add(packs)
        return needs(depth, packs)

    decided(10_000, share=3, needs=watched)
    assert measured == {3}


def test_what_bends_upwards_is_never_overestimated_in_packs() -> None:
    def bent(depth: str, packs: int) -> int:
        return 1000 + max(100 * packs, 300 * packs - 1000)

    for room in range(1100, 5000, 50):
        _, packs = decided(room, share=64, most=64, needs=bent, depths=("none",))
        assert packs == 1 or bent("none", packs) <= room


@pytest.mark.parametrize(
    ("share", "most", "expected"),
    [(16, 16, 16), (16, 9, 8), (16, 8, 8), (16, 7, 6), (5, 4, 3), (7, 1, 1), (3, 9, 3)],
)
def test_shares_are_cut_evenly(share: int, most: int, expected: int) -> None:
    assert evenly(share, most) == expected


# ---- for a run -------------------------------------------------------------------------------------


def situation(
    folder: Path,
    run: Path,
    room: int = 100 * GIB,
    world: World | None = None,
    gpu: bool = False,
    **train: Any,
) -> Situation:
    """Of a tiny model with packs of 2,048 tokens and 8 slots; see `told`."""
    config = Config.model_validate({"train": {"global_batch": 8, **train}})
    assignment: Any = SimpleNamespace(
        config=config,
        store=SimpleNamespace(manifest=SimpleNamespace(seq_len=2048)),
        plan=SimpleNamespace(order=SimpleNamespace(slots=lambda rank, size: range(rank, 8, size))),
        run=RunDir(str(run)),
        identity={"run.seed": 0, "adapter": None},
        ds_config=None,
    )
    return Situation(
        assignment=assignment,
        world=world or World.alone(),
        choice=Choice("ddp", EngineConfig(), ""),
        sizes=Sizes(frozen=10 << 20, trainable=1 << 20, gpu=gpu),
        memory=room,
        built=build(ModelConfig(name=str(folder)), AdapterConfig(), 0, torch.float32, torch.float32),
        tell=Told(),
    )


class Told(list[tuple[str, str]]):
    """What people are told."""

    def __call__(self, kind: str, content: dict[str, Any]) -> None:
        self.append((kind, content["text"]))


def told(made: Situation) -> list[tuple[str, str]]:
    assert isinstance(made.tell, Told)
    return made.tell


@pytest.fixture(autouse=True)
def _choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several packs keep this CPU busy, so that there is something to decide."""
    monkeypatch.setitem(memory.BUSY_TOKENS, "cpu", 8192)


def test_a_cpu_with_room_keeps_all_activations_and_is_busy(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    made = situation(tiny_models["qwen2"], tmp_path)
    cut = fitted(made)
    assert (cut.depth, cut.micro_batch) == ("none", 4)
    assert cut.needed == (10 << 20) + (1 << 20) * 28 + foreseen(made.built, 4 * 2048).peak
    (note,) = told(made)
    needed = human_bytes(cut.needed or 0)
    assert note == (
        "note",
        f"micro_batch 4 (8,192 tokens), no activation checkpointing: about {needed} of 100 GiB",
    )


def test_a_gpu_with_room_takes_the_whole_share(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    cut = fitted(situation(tiny_models["qwen2"], tmp_path, gpu=True))
    assert (cut.depth, cut.micro_batch) == ("none", 8)


def test_short_memory_is_answered_with_depth_then_with_fewer_packs(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    made = situation(tiny_models["qwen2"], tmp_path / "a")
    held, found = held_bytes(made), list[Cut]()
    for depth, packs in (("none", 4), ("every-2", 4), ("full", 4), ("full", 1)):
        made.built.recompute(depth)
        least = held + foreseen(made.built, packs * 2048).peak
        tight = situation(tiny_models["qwen2"], tmp_path / f"{depth}{packs}", int(least / memory.USABLE) + 2)
        found.append(fitted(tight))
        assert (found[-1].depth, found[-1].micro_batch) == (depth, packs)
        assert tight.built.base.is_activation_checkpointing == (depth != "none")
        assert [kind for kind, _ in told(tight)] == ["note"]
    assert "activation checkpointing in one layer of 2" in found[1].describe(2048)
    assert "activation checkpointing in every layer" in found[2].describe(2048)


def test_where_nothing_fits_it_is_said_and_trained_all_the_same(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    made = situation(tiny_models["qwen2"], tmp_path / "a", 50 << 20)
    cut = fitted(made)
    assert (cut.depth, cut.micro_batch) == ("full", 1)
    (_, (kind, text)) = told(made)
    assert kind == "warning"
    needed = human_bytes(cut.needed or 0)
    assert text.startswith(
        f"this may not fit: training takes about {needed}, and of the 50 MiB that a worker"
    )
    assert text.endswith("What helps: data.seq_len below 2048; engine.kind=fsdp with more workers.")
    asked = situation(
        tiny_models["qwen2"], tmp_path / "b", 50 << 20, micro_batch=2, activation_checkpointing="none"
    )
    cut = fitted(asked)
    assert (cut.depth, cut.micro_batch) == ("none", 2)
    (_, (_, text)) = told(asked)
    assert (
        "helps: train.activation_checkpointing=full; train.micro_batch below 2; data.seq_len below 2048;"
        in text
    )


def test_a_restart_keeps_what_was_decided_whatever_is_free_then(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_models["qwen2"]
    first = fitted(situation(folder, tmp_path))
    again = situation(folder, tmp_path, 50 << 20)
    assert fitted(again) == first
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert kept[0]["cut"] == {"micro_batch": 4, "depth": "none", "needed": first.needed, "memory": 100 * GIB}
    # Another world, another engine, another wish: decided anew.
    other = situation(folder, tmp_path, 50 << 20)
    for changed in (
        replace(other, world=World(0, 1, torch.device("meta"))),
        replace(other, choice=Choice("ddp", EngineConfig(kind="ddp"), "")),
        situation(folder, tmp_path, 50 << 20, micro_batch=1),
    ):
        cut = fitted(changed)
        assert (cut.micro_batch, cut.depth) == (1, "full")
        (tmp_path / "memory.json").write_text(json.dumps(kept))


def test_another_gpu_is_decided_for_anew_and_the_first_is_remembered(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_models["qwen2"]
    large = fitted(situation(folder, tmp_path, 100 * GIB, gpu=True))
    small = fitted(situation(folder, tmp_path, 50 << 20, gpu=True))
    assert (large.micro_batch, large.depth) != (small.micro_batch, small.depth)
    assert small.memory == 50 << 20
    assert fitted(situation(folder, tmp_path, 100 * GIB, gpu=True)) == large
    assert len(json.loads((tmp_path / "memory.json").read_text())) == 2


def test_all_ranks_hear_the_same_from_the_first(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    # Made one after the other: accelerate changes torch's classes while a model without weights is made, and ranks are
    # threads here.
    prepared = [situation(tiny_models["qwen2"], tmp_path, memory) for memory in (50 << 20, 100 * GIB)]

    def rank(world: World) -> tuple[Cut, bool]:
        made = replace(prepared[world.rank], world=world)
        return fitted(made), made.built.base.is_activation_checkpointing

    one, other = on_ranks(2, rank)
    assert one == other
    assert one[0].depth == "full"
    assert one[1]


def test_what_cannot_be_foreseen_is_computed_as_a_rule_of_thumb_says(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("looks at values\nin a kernel")

    monkeypatch.setattr(memory, "foreseen", fails)
    for gpu, expected in ((False, ("none", 4)), (True, ("full", 4))):
        made = situation(tiny_models["qwen2"], tmp_path / str(gpu), gpu=gpu)
        cut = fitted(made)
        assert (cut.depth, cut.micro_batch, cut.needed) == (*expected, None)
        ((_, why), (_, what)) = told(made)
        assert why.endswith("can't be foreseen for this model: looks at values")
        assert "about" not in what


def test_a_model_that_cannot_recompute_keeps_all(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    made = situation(tiny_models["qwen2"], tmp_path / "a", 50 << 20)
    made.built.base.supports_gradient_checkpointing = False
    assert fitted(made).depth == "none"
    made = situation(tiny_models["qwen2"], tmp_path / "b", activation_checkpointing="full")
    made.built.base.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="can't recompute activations"):
        fitted(made)


@pytest.mark.parametrize("engine", [{"kind": "fsdp"}, {"kind": "zero", "stage": 3}])
def test_what_is_gathered_counts_where_parameters_are_spread(
    tiny_models: dict[str, Path], tmp_path: Path, engine: dict[str, Any]
) -> None:
    made = situation(tiny_models["qwen2"], tmp_path)
    spread = replace(made, choice=Choice(engine["kind"], EngineConfig(**engine), ""))
    each = 16 if engine["kind"] == "fsdp" else 20
    assert held_bytes(spread) == (10 << 20) + (1 << 20) * (each + 12) + gathered(made.built)


def test_gathered_are_the_outside_and_two_layers(tiny_models: dict[str, Path]) -> None:
    def sizes(made: Built) -> tuple[int, int, int]:
        whole = sum(p.numel() for p in made.module.parameters())
        layer = sum(p.numel() for p in made.blocks[0].parameters())
        return whole, layer, len(made.blocks)

    config = ModelConfig(name=str(tiny_models["qwen2"]))
    frozen = build(config, AdapterConfig(), 0, torch.bfloat16, torch.float32)
    for parameter in frozen.module.parameters():
        parameter.requires_grad_(False)
    whole, layer, count = sizes(build(config, AdapterConfig(kind="none"), 0, torch.bfloat16, torch.float32))
    trained = gathered(build(config, AdapterConfig(kind="none"), 0, torch.bfloat16, torch.float32))
    assert trained == (whole - (count - 2) * layer) * (2 + 2 + 4)


# ---- after the first step on a GPU ------------------------------------------------------------------


def test_a_promise_that_is_not_kept_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, rows, said = Cut(4, "none", 3 * GIB, 10 * GIB), list[Any](), list[str]()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 4 * GIB)
    log = looked_after(cut, torch.device("cuda", 0), rows.append, said.append)
    for row in ({"eval_loss": 1.0}, {"loss": 1.0}, {"loss": 2.0}):
        log(row)
    assert said == [
        "until the end of the first step up to 4 GiB of the GPU's memory were taken, more than the 3 GiB that were "
        "foreseen"
    ]
    assert len(rows) == 3
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    looked_after(cut, torch.device("cuda", 0), rows.append, said.append)({"loss": 1.0})
    looked_after(cut, torch.device("cpu"), rows.append, said.append)({"loss": 1.0})
    looked_after(replace(cut, needed=None), torch.device("cuda", 0), rows.append, said.append)({"loss": 1.0})
    assert len(said) == 1
    assert len(rows) == 6
