"""What is known of the trials of a sweep. A trial is settings and an outcome, however it was trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Report:
    """Where a trial stood when its held-out loss was measured.

    Attributes:
        number: 1 for the trial's first report; the same number is the same share of every trial's run.
        step: optimizer steps done.
        total_steps: of the whole trial.
        tokens: trained on so far.
        seconds: in training steps so far.
        metrics: eval_loss, loss (the mean since the report before), tokens_per_s, trainable_parameters, ...
    """

    number: int
    step: int
    total_steps: int
    tokens: int
    seconds: float
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Attributes:
        number: from 1 on, in the order they were suggested.
        values: dotted key to value, of every setting that is searched; as they were at the end.
        status: where it stands.
        reports: in order.
        run: its run directory; where it was begun anew from another trial's checkpoint, the newest one.
        reason: why it was stopped or failed.
        origin: "trial 3, step 40" where it was begun from another trial's checkpoint.
    """

    number: int
    values: Mapping[str, Any]
    status: Status = "running"
    reports: tuple[Report, ...] = ()
    run: str = ""
    reason: str | None = None
    origin: str | None = None

    @property
    def name(self) -> str:
        """Of its run directory, too."""
        return trial_name(self.number)

    @property
    def last(self) -> Report | None:
        """The newest report."""
        return self.reports[-1] if self.reports else None

    def value(self, metric: str) -> float | None:
        """A metric as it was at the newest report; None where it is not known or no number."""
        value = self.last.metrics.get(metric) if self.last else None
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Goal:
    """What makes a trial better than another.

    Attributes:
        metrics: the first one decides; further ones are objectives beside it.
        modes: min or max, for each.
    """

    metrics: tuple[str, ...]
    modes: tuple[Literal["min", "max"], ...]

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """The best first by the first metric at each trial's newest report; those without one at the end."""
        metric, sign = self.metrics[0], 1 if self.modes[0] == "min" else -1

        def key(trial: Trial) -> tuple[float, float, int]:
            value = trial.value(metric)
            return (1.0, 0.0, trial.number) if value is None else (0.0, sign * value, trial.number)

        return sorted(trials, key=key)

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """The best trial that did not fail and has a value."""
        ranked = self.ranked(
            [t for t in trials if t.status != "failed" and t.value(self.metrics[0]) is not None]
        )
        return ranked[0] if ranked else None

    def pareto(self, trials: Sequence[Trial]) -> set[int]:
        """The numbers of the trials that no other one beats in every metric."""
        points = {t.number: self._costs(t) for t in trials if t.status != "failed"}
        known = {number: costs for number, costs in points.items() if costs is not None}
        return {
            n for n, costs in known.items() if not any(_dominates(other, costs) for other in known.values())
        }

    def _costs(self, trial: Trial) -> tuple[float, ...] | None:
        costs = []
        for metric, mode in zip(self.metrics, self.modes, strict=True):
            value = trial.value(metric)
            if value is None:
                return None
            costs.append(value if mode == "min" else -value)
        return tuple(costs)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def trial_name(number: int) -> str:
    """0007 for 7."""
    return f"{number:04d}"
