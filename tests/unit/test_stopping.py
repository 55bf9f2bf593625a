"""Signals become an exception that says which one it was, and an exit code that says it too."""

from __future__ import annotations

import os
import signal

import pytest

from raytune_ds.command import guarded
from raytune_ds.errors import Stopped
from raytune_ds.stopping import stoppable


def _stopped_by(number: int) -> int:
    with stoppable():
        os.kill(os.getpid(), number)
        signal.pause()
    return 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code(number: int, code: int) -> None:
    before = signal.getsignal(number)
    assert guarded(lambda: _stopped_by(number), debug=True) == code
    assert signal.getsignal(number) is before


def test_what_ray_raises_in_its_place_is_the_same_to_us() -> None:
    """`ray.get` answers any signal with a KeyboardInterrupt of its own."""

    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("of another's making") from None

    with pytest.raises(Stopped) as stopped, stoppable():
        action()
    assert stopped.value.signal == signal.SIGTERM


def test_a_second_signal_does_not_disturb_the_end() -> None:
    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    done: list[bool] = []
    with pytest.raises(Stopped), stoppable():
        action()
    assert done
