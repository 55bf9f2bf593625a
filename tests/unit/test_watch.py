"""Workers that stop answering are found, and only they."""

from __future__ import annotations

from raytune_ds.watch import Hang, Pulse, Watch


def watched(timeout_s: float | None = 10.0, size: int = 3) -> tuple[Watch, list[Pulse]]:
    watch, pulses = Watch(timeout_s, 5.0), [Pulse(rank) for rank in range(size)]
    watch.begin(range(size), 0.0)
    for pulse in pulses:
        pulse.moves("computing step 1")
        watch.note(pulse.beat(), 0.0)
    return watch, pulses


def beat(watch: Watch, pulses: list[Pulse], now: float) -> None:
    for pulse in pulses:
        watch.note(pulse.beat(), now)


def test_workers_that_get_on_do_not_hang() -> None:
    """One of them by steps, the others within theirs."""
    watch, pulses = watched()
    for now in range(1, 40):
        pulses[0].moves(f"computing step {now}")
        pulses[1].lives()
        beat(watch, pulses[:2], now)
        watch.note(pulses[2].beat(), now)
        assert watch.look(now) is None


def test_a_worker_without_a_sign_of_life_is_named() -> None:
    watch, pulses = watched()
    beat(watch, [pulses[0], pulses[2]], 8.0)
    assert watch.look(10.0) is None
    hang = watch.look(12.0)
    assert hang == Hang(
        "workers hung: no sign of life: worker 1 (not heard of since 12s, computing step 1 then)", (1,)
    )


def test_the_worker_that_the_others_wait_for_is_named() -> None:
    watch, pulses = watched()
    for pulse in (pulses[0], pulses[2]):
        pulse.moves("taking the checkpoint of step 1")
    for now in (1.0, 6.0, 11.0):
        beat(watch, pulses, now)
        assert watch.look(now) is None
    beat(watch, pulses, 12.0)
    hang = watch.look(12.0)
    assert hang == Hang("workers hung: the others wait for worker 1 (computing step 1 for 12s)", (1,))


def test_where_nothing_tells_them_apart_all_are_named() -> None:
    watch, pulses = watched(size=6)
    beat(watch, pulses, 11.0)
    hang = watch.look(11.0)
    assert hang is not None
    assert hang.culprits == (0, 1, 2, 3, 4, 5)
    assert hang.text.startswith("workers hung: none gets on: worker 0 (computing step 1 for 11s); worker 1")
    assert hang.text.endswith("worker 3 (computing step 1 for 11s); 2 more")


def test_a_hang_is_told_once_and_again_if_nobody_helps() -> None:
    watch, pulses = watched()
    looks = []
    for now in range(30):  # it is looked every second
        beat(watch, pulses, now)
        looks.append(watch.look(now) is not None)
    assert [now for now, told in enumerate(looks) if told] == [11, 22]


def test_who_does_not_train_does_not_hang_nor_do_those_who_wait_for_it() -> None:
    """While it loads, or a tracker keeps it waiting."""
    watch, pulses = watched()
    pulses[1].rests()
    for now in range(0, 100, 5):
        beat(watch, pulses, now)
        assert watch.look(now) is None


def test_but_it_has_to_show_that_it_lives() -> None:
    """From the moment on that it is there."""
    watch = Watch(10.0, 5.0)
    watch.begin([0, 1], 0.0)
    watch.note(Pulse(1).beat(), 8.0)
    assert watch.look(9.0) is None
    hang = watch.look(12.0)
    assert hang is not None
    assert hang.text == "workers hung: no sign of life: worker 0 (not heard of since 12s, not training then)"


def test_what_one_rank_does_alone_is_no_new_place() -> None:
    watch, pulses = watched()
    with pulses[0].resting():
        assert pulses[0].beat().doing is None
    assert pulses[0].beat().doing == "computing step 1"
    pulses[1].moves("computing step 2")
    for now in (1.0, 12.0):
        beat(watch, pulses, now)
    hang = watch.hang(12.0)
    assert hang is not None
    assert hang.culprits == (0, 2)


def test_who_has_done_all_does_not_hang() -> None:
    watch, pulses = watched()
    watch.leaves(1)
    watch.note(pulses[1].beat(), 1.0)  # on its way since before
    beat(watch, [pulses[0], pulses[2]], 12.0)
    pulses[0].lives()
    beat(watch, [pulses[0], pulses[2]], 13.0)
    assert watch.look(13.0) is None


def test_a_group_that_is_shut_down_does_not_hang() -> None:
    watch, _ = watched()
    watch.end()
    assert watch.look(50.0) is None


def test_a_rank_that_a_new_group_has_not_got_is_not_waited_for() -> None:
    watch, pulses = watched()
    watch.begin([0, 1], 50.0)
    watch.note(pulses[2].beat(), 51.0)
    pulses[0].lives()
    beat(watch, pulses[:2], 60.0)
    assert watch.look(61.0) is None


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """The machine was stopped, and all of them with it."""
    watch, pulses = watched()
    assert watch.look(1.0) is None
    assert watch.look(1000.0) is None
    beat(watch, pulses[:2], 1005.0)
    assert watch.look(1005.0) is None
    assert watch.look(1011.0) is not None


def test_without_a_timeout_nobody_is_looked_for() -> None:
    watch, _ = watched(timeout_s=None)
    assert watch.look(1e6) is None


TIMED_OUT = "worker 0, 2 died: Timed out waiting 5000ms for recv operation to complete"


def test_a_death_while_others_get_on_is_no_timeout() -> None:
    watch, pulses = watched(timeout_s=None)
    pulses[0].moves("computing step 2")
    beat(watch, pulses, 4.0)
    assert watch.explain("worker 1 died: Read timed out", [1], 5.0) == "worker 1 died: Read timed out"


def test_of_a_timeout_the_rank_that_did_not_come_is_named() -> None:
    watch, pulses = watched(timeout_s=None)
    for pulse in (pulses[0], pulses[2]):
        pulse.moves("computing step 2")
    beat(watch, pulses, 1.0)
    beat(watch, pulses, 4.0)
    assert watch.explain(TIMED_OUT, [0], 4.0) == f"{TIMED_OUT}; did not come: worker 1 (computing step 1)"


def test_of_a_timeout_the_rank_that_was_silent_is_named() -> None:
    watch, pulses = watched(timeout_s=None)
    beat(watch, pulses[:2], 4.0)
    assert watch.explain(TIMED_OUT, [0], 5.0) == f"{TIMED_OUT}; did not come: worker 2 (computing step 1)"


def test_of_a_timeout_of_ranks_at_one_place_nothing_is_made_up() -> None:
    watch, pulses = watched(timeout_s=None)
    beat(watch, pulses, 4.0)
    assert watch.explain(TIMED_OUT, [0], 4.0) == TIMED_OUT


def test_who_failed_by_itself_is_not_missed() -> None:
    """It says nothing any more, for it has given up waiting."""
    watch, pulses = watched(timeout_s=None)
    beat(watch, pulses[2:], 8.0)
    assert watch.explain(TIMED_OUT, [0], 8.0) == f"{TIMED_OUT}; did not come: worker 1 (computing step 1)"


def test_who_was_ended_for_a_hang_died_of_it_and_later_ones_did_not() -> None:
    watch, pulses = watched()
    beat(watch, pulses[1:], 11.0)
    hang = watch.hang(11.0)
    assert hang is not None
    assert watch.condemn(11.0) == hang.culprits == (0,)
    beat(watch, pulses, 12.0)  # as asking for its stack wakes up one that was stopped
    assert watch.explain("worker 1 died: connection reset", [1], 12.0) == hang.text
    watch.begin(range(3), 20.0)
    assert watch.condemn(21.0) == ()
    assert watch.explain("worker 1 died: out of memory", [1], 21.0) == "worker 1 died: out of memory"
