"""SIGINT and SIGTERM while a run goes on: an exception in the main thread, whatever Ray makes of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from raytune_ds.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM interrupt what is within, which ends with `Stopped`.

    Only the first one counts: the end is under way then. `ray.init` puts a handler of its own in place, so this comes
    after it. Other threads than the main one, which signals never reach, are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    received: int = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        # `ray.get` raises one of its own in place of whatever a handler raised, so the number is kept here.
        raise Stopped(received) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
