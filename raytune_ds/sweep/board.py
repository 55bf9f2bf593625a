"""A sweep as it goes on, for people: a line for what matters, and one that moves."""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ds.console import ProgressLine, human_count, say, warn
from raytune_ds.sweep.records import Goal, Trial
from raytune_ds.sweep.space import shown

POLL_S = 0.5


@ray.remote(num_cpus=0)
class Board:
    """Where the running trials leave how far they are."""

    def __init__(self) -> None:
        self._notes: dict[int, dict[str, Any]] = {}

    def note(self, number: int, content: dict[str, Any]) -> None:
        """A trial's newest step, or its start."""
        self._notes.setdefault(number, {}).update(content)

    def read(self) -> dict[int, dict[str, Any]]:
        """All of it."""
        return self._notes


def board() -> Any:
    """A board on the driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # Ray adds it


class SweepDisplay:
    """Shows a sweep."""

    def __init__(self, board: Any, goal: Goal, trials: list[Trial], total: int) -> None:
        """Of that many trials at most, of which some may be there already."""
        self._board, self._goal, self._total = board, goal, total
        self._trials = {trial.number: trial for trial in trials}
        self._progress = ProgressLine("sweep", total)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> SweepDisplay:
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.__exit__(None, None, None)

    # ---------------------------------------------------------------------------- see course.Listener

    def begins(self, trial: Trial) -> None:
        """A line with its values."""
        self._trials[trial.number] = trial
        say(f"{trial.name} {'goes on' if trial.reports else 'begins'}: {shown(trial.values)}")

    def reported(self, trial: Trial, decision: str) -> None:
        """A line with its metrics, beside the best so far."""
        before, self._trials[trial.number] = self._trials[trial.number], trial
        report = trial.last
        assert report is not None
        if trial.origin != before.origin:
            say(f"{trial.name} went on from {trial.origin}: {shown(trial.values)}")
        line = f"{trial.name} step {report.step} of {report.total_steps}: {self._metrics(trial)}"
        best = self._goal.best(list(self._trials.values()))
        if best is not None and best.number == trial.number:
            line += "  the best so far"
        elif best is not None:
            line += f"  (best {self._metrics(best)}, trial {best.name})"
        say(line)

    def ended(self, trial: Trial) -> None:
        """A line with the reason."""
        self._trials[trial.number] = trial
        if trial.status == "failed":
            warn(f"{trial.name} failed: {trial.reason}")
        else:
            say(f"{trial.name} {trial.status}" + (f" {trial.reason}" if trial.reason else ""))

    def _metrics(self, trial: Trial) -> str:
        return ", ".join(f"{metric} {_short(trial.value(metric))}" for metric in self._goal.metrics)

    # -------------------------------------------------------------------------------- the moving line

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                notes = ray.get(self._board.read.remote(), timeout=30)
            except ray.exceptions.RayError:
                return
            self._move(notes)

    def _move(self, notes: dict[int, dict[str, Any]]) -> None:
        trials = list(self._trials.values())
        ended = sum(trial.status != "running" for trial in trials)
        running = {t.number: notes[t.number] for t in trials if t.status == "running" and t.number in notes}
        done = ended + sum(note["step"] / note["total_steps"] for note in running.values())
        details = [f"{ended} of {self._total} trials done"]
        details += [self._one(number, note) for number, note in running.items()]
        self._progress.update(done, "; ".join(details))

    @staticmethod
    def _one(number: int, note: dict[str, Any]) -> str:
        rate = f", {human_count(note['tokens_per_s'])} tokens/s" if "tokens_per_s" in note else ""
        return f"{number:04d} step {note['step']} of {note['total_steps']}{rate}"


def _short(value: float | None) -> str:
    if value is None:
        return "not a number"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
