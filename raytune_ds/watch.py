"""Workers that stop answering: each says again and again where it is, and somebody looks whether it gets on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from raytune_ds.console import human_time

NAMED = 4
"""Of workers that hang, as many are told of; the stacks are there of all."""
_TIMED_OUT = re.compile(r"tim(?:ed|e) ?out", re.IGNORECASE)


@dataclass(frozen=True)
class Beat:
    """A sign of life of a worker.

    Attributes:
        rank: of the worker.
        place: how far it is; ranks that wait for each other can be compared by it.
        signs: of progress so far, those within a place too.
        doing: what, in words; None while it does not train.
    """

    rank: int
    place: int
    signs: int
    doing: str | None


class Pulse:
    """Where a worker is in its work."""

    def __init__(self, rank: int = 0) -> None:
        """Not training yet."""
        self._rank, self._place, self._signs = rank, 0, 0
        self._doing: str | None = None

    def moves(self, doing: str) -> None:
        """The worker is at something new, as all ranks are sooner or later."""
        self._doing = doing
        self._place += 1
        self._signs += 1

    def lives(self) -> None:
        """It gets on with what it is at."""
        self._signs += 1

    def rests(self) -> None:
        """It does not train any more."""
        self._doing = None

    def beat(self) -> Beat:
        """As of now."""
        return Beat(self._rank, self._place, self._signs, self._doing)


@dataclass(frozen=True)
class Hang:
    """Workers that do not get on.

    Attributes:
        text: which, and what they are at.
        culprits: the ranks that the others wait for; all of them where nothing tells them apart.
    """

    text: str
    culprits: tuple[int, ...]


@dataclass(frozen=True)
class _Seen:
    beat: Beat
    heard_at: float
    moved_at: float

    def since(self, now: float) -> str:
        return f"{self.beat.doing} for {human_time(now - self.moved_at)}"


class Watch:
    """Looks after one group of workers at a time. Times are in seconds of any clock."""

    def __init__(self, timeout_s: float | None, collective_timeout_s: float) -> None:
        """Looks after nobody yet.

        Args:
            timeout_s: the longest that a worker may be silent or at the same thing; None: for ever.
            collective_timeout_s: after which ranks that wait for others give up.
        """
        self._timeout_s, self._collective_timeout_s = timeout_s, collective_timeout_s
        self._seen: dict[int, _Seen] = {}
        self._watches, self._hang, self._told_at = False, "", 0.0

    def begin(self) -> None:
        """A new group is there."""
        self._seen, self._watches, self._hang = {}, True, ""

    def end(self) -> None:
        """The group is about to be shut down."""
        self._watches = False

    def note(self, beat: Beat, now: float) -> None:
        """A sign of life."""
        if not self._watches:
            return
        before = self._seen.get(beat.rank)
        still = before is not None and (before.beat.signs, before.beat.doing) == (beat.signs, beat.doing)
        self._seen[beat.rank] = _Seen(beat, now, before.moved_at if still and before else now)

    def look(self, now: float) -> Hang | None:
        """Workers that do not get on; again after as long a time, should nobody have helped."""
        training = self._training()
        if not self._watches or self._timeout_s is None or not training:
            return None
        if self._hang and now - self._told_at <= self._timeout_s:
            return None
        if silent := [seen for seen in training if now - seen.heard_at > self._timeout_s]:
            text = _each(
                silent, lambda s: f"not heard of since {human_time(now - s.heard_at)}, {s.beat.doing} then"
            )
            return self._told(f"no sign of life: {text}", silent, now)
        if any(now - seen.moved_at <= self._timeout_s for seen in training):
            return None
        if behind := self._behind():
            text = f"the others wait for {_each(behind, lambda seen: seen.since(now))}"
            return self._told(text, behind, now)
        return self._told(f"none gets on: {_each(training, lambda seen: seen.since(now))}", training, now)

    def explain(self, error: str, now: float) -> str:
        """Why workers died: the hang that was seen, or the error, and of a time-out which rank did not come."""
        if self._hang or not _TIMED_OUT.search(error):
            return self._hang or error
        # Whoever was waited for was silent all that time, or is still at an earlier place.
        silent = [seen for seen in self._training() if now - seen.heard_at > self._collective_timeout_s / 2]
        if absent := silent or self._behind():
            return f"{error}; did not come: {_each(absent, lambda seen: seen.beat.doing or '')}"
        return error

    def _training(self) -> list[_Seen]:
        return [seen for seen in self._seen.values() if seen.beat.doing is not None]

    def _behind(self) -> list[_Seen]:
        """Those at an earlier place than the others."""
        training = self._training()
        first = min((seen.beat.place for seen in training), default=0)
        behind = [seen for seen in training if seen.beat.place == first]
        return behind if len(behind) < len(training) else []

    def _told(self, text: str, culprits: list[_Seen], now: float) -> Hang:
        self._hang, self._told_at = f"workers hung: {text}", now
        return Hang(self._hang, tuple(sorted(seen.beat.rank for seen in culprits)))


def _each(several: Iterable[_Seen], tell: Callable[[_Seen], str]) -> str:
    told = [f"worker {s.beat.rank} ({tell(s)})" for s in sorted(several, key=lambda s: s.beat.rank)]
    more = [f"{len(told) - NAMED} more"] if len(told) > NAMED else []
    return "; ".join(told[:NAMED] + more)
