"""What a user can cause is told in a few lines: what, where, and what to do. And how a run is stopped from outside."""

from __future__ import annotations

import signal


class UserError(Exception):
    """An error of the caller's making.

    The message is complete as it stands: what is wrong, where (a file and row, or a config key) and what
    to do about it. Command lines print it without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the paragraphs that follow and the last full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end: Ctrl-C, `ray job stop`, a pod or a node that goes away.

    Command lines exit with 128 more than its number, as shells do.
    """

    def __init__(self, number: int) -> None:
        """`number` of the signal."""
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)
