"""The rows of a run's metrics.jsonl, as they come, to the reports of a trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ds.sweep.records import Report


class Reports:
    """Makes a report of each evaluation, from the rows of a run; rows of a step that comes again replace it."""

    def __init__(self, total_steps: int, eval_every: int, trainable: int) -> None:
        """Of a run of so many steps, evaluated at every so many, with so many trained parameters."""
        self._total, self._every, self._trainable = total_steps, eval_every, trainable
        self._steps: dict[int, Mapping[str, Any]] = {}
        self._last_step = 0

    def feed(self, row: Mapping[str, Any]) -> Report | None:
        """One more row; a report if it is an evaluation that was trained for."""
        if "loss" in row:
            self._steps[row["step"]] = row
        if "eval_loss" not in row or row["step"] == 0:
            return None
        return self._report(row["step"], row["eval_loss"])

    def _report(self, step: int, eval_loss: float | None) -> Report:
        done = [row for number, row in self._steps.items() if number <= step]
        since = [row for row in done if row["step"] > self._last_step] or done
        self._last_step = step
        seconds = sum(row["step_time_s"] for row in since)
        metrics: dict[str, float | None] = {
            "eval_loss": eval_loss,
            "loss": _mean_loss(since),
            "trainable_parameters": self._trainable,
            "tokens": sum(row["tokens"] for row in done),
            "seconds": round(sum(row["step_time_s"] for row in done), 3),
            "tokens_per_s": round(sum(row["tokens"] for row in since) / seconds, 1) if seconds else None,
        }
        return Report(
            number=-(-step // self._every),
            step=step,
            total_steps=self._total,
            tokens=int(metrics["tokens"] or 0),
            seconds=metrics["seconds"] or 0.0,
            metrics=metrics,
        )


def _mean_loss(rows: list[Mapping[str, Any]]) -> float | None:
    """Over all supervised tokens; None if one of the losses is not a number."""
    weight = sum(row["weight"] for row in rows)
    losses = [row["loss"] for row in rows]
    if not weight or None in losses:
        return None
    return sum(row["loss"] * row["weight"] for row in rows) / weight
