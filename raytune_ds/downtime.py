"""What a restart of the workers cost: steps that are done again, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raytune_ds.console import human_time


@dataclass(frozen=True)
class Restart:
    """One restart of the workers. Times are in seconds, and None while the run has not come so far.

    Attributes:
        why: workers died, or their number changes.
        last_step: done before it; 0 if none was.
        from_step: of the checkpoint that the run went on from; 0 is the beginning.
        lost_steps: that are done again.
        num_workers: afterwards.
        noticing_s: from the end of the last step until it was known that workers are gone.
        starting_s: from then until new ones run.
        loading_s: from then until model and checkpoint are loaded.
        first_step_s: from then to the end of the first step.
    """

    why: str
    last_step: int
    from_step: int | None = None
    lost_steps: int | None = None
    num_workers: int | None = None
    noticing_s: float | None = None
    starting_s: float | None = None
    loading_s: float | None = None
    first_step_s: float | None = None

    def __str__(self) -> str:
        parts = {
            "until it was noticed": self.noticing_s,
            "for new workers": self.starting_s,
            "for model and checkpoint": self.loading_s,
            "for the first step": self.first_step_s,
        }
        spent = ", ".join(f"{human_time(seconds or 0)} {what}" for what, seconds in parts.items())
        total = human_time(sum(seconds or 0 for seconds in parts.values()))
        return f"training again after {total} ({spent}); steps done again: {self.lost_steps}"


class Downtime:
    """Makes `Restart`s of the events of a run.

    Attributes:
        restarts: in order; of the last one the run may not be back yet.
    """

    def __init__(self) -> None:
        """Before the first worker is there."""
        self.restarts: list[Restart] = []
        self._is_down = False
        self._last_step = 0
        self._stepped_at: float | None = None
        self._at: float | None = None

    def note(self, kind: str, content: dict[str, Any], now: float) -> Restart | None:
        """One event, and when it came, in seconds of any clock; the restart that ends with it, if one does."""
        read = getattr(self, f"_note_{kind}", None)
        return read(content, now) if read else None

    def _note_restart(self, content: dict[str, Any], now: float) -> None:
        self._begin(content["text"], now)

    def _note_arrived(self, content: dict[str, Any], now: float) -> None:
        if not self._is_down and self._stepped_at is not None:
            self._begin(f"the number of workers changes to {content['world_size']}", self._stepped_at)
        self._next("starting_s", now)

    def _note_start(self, content: dict[str, Any], now: float) -> None:
        step = content["step"]
        lost = max(0, self._last_step - step)  # steps that were left out are not heard of
        self._next("loading_s", now, from_step=step, lost_steps=lost, num_workers=content["world_size"])

    def _note_step(self, content: dict[str, Any], now: float) -> Restart | None:
        was_down = self._is_down
        if was_down and self.restarts[-1].starting_s is None:  # of the old workers, on their last legs
            self._last_step = content["step"]
            self.restarts[-1] = replace(self.restarts[-1], last_step=self._last_step)
            return None
        self._next("first_step_s", now)
        self._is_down, self._last_step, self._stepped_at = False, content["step"], now
        return self.restarts[-1] if was_down else None

    def _begin(self, why: str, now: float) -> None:
        since = self._at if self._is_down or self._stepped_at is None else self._stepped_at
        noticing_s = round(now - (now if since is None else since), 2)
        self.restarts.append(Restart(why, self._last_step, noticing_s=noticing_s))
        self._is_down, self._at = True, now

    def _next(self, part: str, now: float, **found: Any) -> None:
        if self._is_down and self._at is not None:
            self.restarts[-1] = replace(self.restarts[-1], **found | {part: round(now - self._at, 2)})
        self._at = now
