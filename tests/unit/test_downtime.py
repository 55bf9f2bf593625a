"""What a restart costs is told part by part."""

from __future__ import annotations

from typing import Any

from raytune_ds.downtime import Downtime, Restart

START: list[tuple[str, dict[str, Any], float]] = [
    ("arrived", {"world_size": 2}, 20.0),
    ("start", {"step": 0, "world_size": 2}, 25.0),
    ("step", {"step": 1}, 26.0),
    ("checkpoint", {"step": 1}, 26.5),
    ("step", {"step": 2}, 27.0),
]
BACK: list[tuple[str, dict[str, Any], float]] = [
    ("arrived", {"world_size": 2}, 50.0),
    ("start", {"step": 1, "world_size": 2}, 57.0),
    ("step", {"step": 2}, 59.0),
]
DIED = ("restart", {"text": "worker 1 died", "rank": 1}, 30.0)


def told(*events: tuple[str, dict[str, Any], float]) -> tuple[Downtime, list[Restart]]:
    downtime = Downtime()
    return downtime, [r for event in events if (r := downtime.note(*event)) is not None]


def test_a_calm_run_has_no_restarts() -> None:
    downtime, done = told(*START)
    assert downtime.restarts == done == []


def test_every_part_of_a_restart_is_told() -> None:
    downtime, done = told(*START, DIED, *BACK, ("step", {"step": 3}, 60.0))
    expected = Restart("worker 1 died", 2, 1, 1, 2, 3.0, 20.0, 7.0, 2.0)
    assert downtime.restarts == done == [expected]
    assert expected.lost_steps == 1
    assert str(expected) == (
        "training again after 32s (3s until it was noticed, 20s for new workers, 7s for model and checkpoint, 2s for "
        "the first step); steps done again: 1"
    )


def test_new_workers_without_a_death_are_a_change_of_their_number() -> None:
    others = BACK[1:]
    _, done = told(*START, ("arrived", {"world_size": 3}, 50.0), *others)
    assert [(r.why, r.noticing_s, r.starting_s) for r in done] == [
        ("the number of workers changes to 3", 0.0, 23.0)
    ]


def test_what_is_not_over_is_told_as_far_as_it_came() -> None:
    downtime, done = told(*START, DIED, BACK[0])
    assert done == []
    assert downtime.restarts == [Restart("worker 1 died", 2, noticing_s=3.0, starting_s=20.0)]
    assert downtime.restarts[0].lost_steps is None


def test_workers_that_die_before_they_train_are_two_restarts() -> None:
    downtime, done = told(
        *START,
        DIED,
        BACK[0],
        ("restart", {"text": "again"}, 55.0),
        ("arrived", {"world_size": 2}, 56.0),
        *BACK[1:],
    )
    assert [restart.why for restart in downtime.restarts] == ["worker 1 died", "again"]
    assert [restart.why for restart in done] == ["again"]
    assert [restart.noticing_s for restart in downtime.restarts] == [
        3.0,
        5.0,
    ]  # the time since, and not twice


def test_steps_that_were_left_out_are_not_lost() -> None:
    """Nobody reports them, so the checkpoint may be of a later step than the last one that was heard of."""
    downtime, _ = told(*START, DIED, BACK[0], ("start", {"step": 5, "world_size": 2}, 57.0))
    assert downtime.restarts[0].lost_steps == 0


def test_a_death_before_the_first_step_costs_no_step() -> None:
    downtime, _ = told(START[0], DIED, *START)
    assert (downtime.restarts[0].last_step, downtime.restarts[0].lost_steps) == (0, 0)


def test_a_death_before_anything_happened_is_noticed_at_once() -> None:
    """Whatever the clock counts from."""
    downtime, _ = told(("restart", {"text": "out of memory"}, 86400.0))
    assert downtime.restarts[0].noticing_s == 0


def test_a_last_step_of_the_old_workers_does_not_end_a_restart() -> None:
    """Where a node gave notice they go on until they are ended."""
    downtime, done = told(*START, DIED, ("step", {"step": 3}, 31.0), *BACK)
    assert downtime.restarts == done
    assert [(r.why, r.last_step, r.lost_steps, r.starting_s) for r in done] == [("worker 1 died", 3, 2, 20.0)]
