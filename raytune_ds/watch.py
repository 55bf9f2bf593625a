"""Workers that stop answering: each says again and again where it is, and somebody looks whether it gets on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from raytune_ds.console import human_time

NAMED = 4
"""Of workers that hang, as many are told of; the stacks are there of all."""
BLIND_S = 10.0
"""Between two looks, which are fractions of a second apart where nothing is wrong."""


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
        """It is at something long that shows no progress, or does not train any more."""
        self._doing = None

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """For what others do not do: it is no new place."""
        doing = self._doing
        self.rests()
        try:
            yield
        finally:
            self._doing = doing
            self.lives()

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

    @property
    def doing(self) -> str:
        return self.beat.doing or "not training"

    def since(self, now: float) -> str:
        return f"{self.doing} for {human_time(now - self.moved_at)}"


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
        self._told_at: float | None = None
        self._sentence = ""
        self._looked_at: float | None = None

    def begin(self, ranks: Iterable[int], now: float) -> None:
        """These are a new group."""
        self._seen = {rank: _Seen(Beat(rank, 0, 0, None), now, now) for rank in ranks}
        self._told_at, self._sentence = None, ""

    def end(self) -> None:
        """The group is about to be shut down."""
        self._seen = {}

    def note(self, beat: Beat, now: float) -> None:
        """A sign of life."""
        before = self._seen.get(beat.rank)
        if before is None:
            return
        if (before.beat.signs, before.beat.doing) == (beat.signs, beat.doing):
            self._seen[beat.rank] = _Seen(beat, now, before.moved_at)
        else:
            self._seen[beat.rank] = _Seen(beat, now, now)

    def leaves(self, rank: int) -> None:
        """A worker has done all that it was to do."""
        self._seen.pop(rank, None)

    def look(self, now: float) -> Hang | None:
        """Workers that do not get on; again after as long a time, should nobody have helped."""
        self._forgive(now)
        hang = self.hang(now)
        told = (
            self._told_at is not None
            and self._timeout_s is not None
            and now - self._told_at <= self._timeout_s
        )
        if hang is None or told:
            return None
        self._told_at = now
        return hang

    def condemn(self, now: float) -> tuple[int, ...]:
        """The ranks that hold up the others and are to be ended; what comes of it is explained by that."""
        hang = self.hang(now)
        if hang is None:
            return ()
        self._sentence = hang.text
        return hang.culprits

    def hang(self, now: float) -> Hang | None:
        """Workers that do not get on."""
        if self._timeout_s is None or not self._seen:
            return None
        limit, everybody = now - self._timeout_s, self._seen.values()
        if silent := [seen for seen in everybody if seen.heard_at < limit]:
            text = _each(
                silent, lambda s: f"not heard of since {human_time(now - s.heard_at)}, {s.doing} then"
            )
            return _hang_of(f"no sign of life: {text}", silent)
        # One that does not train may be at something long that shows no progress, and the others wait for it.
        if any(seen.beat.doing is None or seen.moved_at >= limit for seen in everybody):
            return None
        if behind := self._behind():
            return _hang_of(f"the others wait for {_each(behind, lambda seen: seen.since(now))}", behind)
        return _hang_of(f"none gets on: {_each(everybody, lambda seen: seen.since(now))}", everybody)

    def explain(self, error: str, failed: Collection[int], now: float) -> str:
        """Why workers died: the hang that they were ended for, or the error, and after a time-out which did not come.

        Args:
            error: that Ray tells of.
            failed: the ranks that it is of.
            now: the time.
        """
        if self._sentence:
            return self._sentence
        limit, everybody = now - self._collective_timeout_s / 2, self._seen.values()
        silent = [seen for seen in everybody if seen.heard_at < limit and seen.beat.rank not in failed]
        stood_still = everybody and all(seen.moved_at < limit for seen in everybody)
        absent = silent or (self._behind() if stood_still else [])
        return f"{error}; did not come: {_each(absent, lambda seen: seen.doing)}" if absent else error

    def _behind(self) -> list[_Seen]:
        """Those at an earlier place than the others."""
        first = min((seen.beat.place for seen in self._seen.values()), default=0)
        behind = [seen for seen in self._seen.values() if seen.beat.place == first]
        return behind if len(behind) < len(self._seen) else []

    def _forgive(self, now: float) -> None:
        """Who does not look for long was stopped, and perhaps all with it: that time does not count."""
        gap = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if gap > BLIND_S:
            self._seen = {
                rank: _Seen(seen.beat, min(now, seen.heard_at + gap), min(now, seen.moved_at + gap))
                for rank, seen in self._seen.items()
            }


def _hang_of(text: str, culprits: Iterable[_Seen]) -> Hang:
    return Hang(f"workers hung: {text}", tuple(sorted(seen.beat.rank for seen in culprits)))


def _each(several: Iterable[_Seen], tell: Callable[[_Seen], str]) -> str:
    told = [f"worker {s.beat.rank} ({tell(s)})" for s in sorted(several, key=lambda s: s.beat.rank)]
    more = [f"{len(told) - NAMED} more"] if len(told) > NAMED else []
    return "; ".join(told[:NAMED] + more)
