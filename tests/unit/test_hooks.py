"""What the loop sets off, in the order that others rely on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ds import hooks
from raytune_ds.hooks import Orders, hooks_of
from raytune_ds.watch import Pulse
from raytune_ds.world import World
from tests.ranks import on_ranks

ASSIGNMENT: Any = SimpleNamespace(config=None, plan=None, run=None)


def nobody(*_: Any) -> None:
    """Hears what is reported."""


def made(orders: Orders, saver: Any = None, told: list[Any] | None = None) -> hooks.Hooks:
    """Hooks of a run of one rank."""
    heard = [] if told is None else told
    return hooks_of(
        ASSIGNMENT,
        World.alone(),
        None,
        saver,
        None,
        lambda *event: heard.append(event),
        orders,  # type: ignore[arg-type]
    )


def test_who_judges_is_asked_once_the_checkpoint_is_written() -> None:
    """For it may end this process at once."""
    happened: list[Any] = []
    saver = SimpleNamespace(wait=lambda: happened.append("written"))
    judged = made(Orders(judge=lambda step: bool(happened.append(step))), saver)
    assert not judged.goes_on(3)
    assert happened == ["written", 3]


def test_a_run_that_nobody_judges_waits_for_nothing() -> None:
    assert made(Orders()).goes_on(3)


def test_who_waits_for_a_verdict_does_not_count_as_hung() -> None:
    doing: list[Any] = []
    pulse = Pulse()
    pulse.moves("measuring the held-out loss after step 3")
    orders = Orders(judge=lambda step: not doing.append(pulse.beat().doing), pulse=pulse)
    judged = made(orders, SimpleNamespace(wait=lambda: doing.append(pulse.beat().doing)))
    assert judged.goes_on(3)
    assert doing == ["measuring the held-out loss after step 3", None]
    judged.moves("fetching the batch of step 4")
    assert pulse.beat().doing == "fetching the batch of step 4"


def test_nodes_are_looked_at_now_and_then_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    told: list[Any] = []
    wishing = made(Orders(stop_asked=lambda: now[0] > 8, is_leaving=lambda: True), told=told)
    wishes = []
    for now[0] in (1.0, 5.5, 6.0, 9.0, 11.0):
        wishes.append(wishing.wishes())
    assert wishes == [(False, False), (True, False), (False, False), (False, True), (True, True)]
    assert wishing.is_leaving()
    assert told == [("note", {"text": "a node is about to go: taking a checkpoint"})]


def test_every_rank_waits_for_the_verdict_by_itself() -> None:
    """Not in a collective, which gives up long before some verdicts come."""
    asked: list[int] = []

    def goes_on(world: World) -> bool:
        orders = Orders(judge=lambda step: bool(asked.append(world.rank)) or world.rank == 0)
        return hooks_of(
            ASSIGNMENT, world, None, SimpleNamespace(wait=lambda: None), None, nobody, orders
        ).goes_on(3)

    assert on_ranks(3, goes_on) == [True] * 3  # that of rank 0 counts
    assert sorted(asked) == [0, 1, 2]


def test_ranks_whose_clocks_differ_take_a_last_checkpoint_together() -> None:
    def leaves(world: World) -> bool:
        orders = Orders(is_leaving=lambda: world.rank == 0)
        return hooks_of(ASSIGNMENT, world, None, None, None, nobody, orders).is_leaving()

    assert on_ranks(2, leaves) == [True, True]
