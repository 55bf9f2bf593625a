"""Steps that go wrong are skipped; what becomes of the run after several of them, one after the other.

All of it follows from losses and gradient norms, which every rank knows alike, and from `Lapses`, which a checkpoint
keeps. So ranks decide alike without asking each other, and a resumed run decides as it would have done.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_ds.config import TrainConfig
from raytune_ds.errors import UserError

MEDIAN_OVER = 64
FEWEST_LOSSES = 16
"""Before there are so many, the loss of a new run still falls too fast to be compared with their median."""
NAMED = 3
"""Of steps that are skipped one after the other, as many have their rows named."""


@dataclass
class Lapses:
    """What a run remembers of steps that went wrong.

    Attributes:
        in_a_row: the steps that were skipped last, one after the other; none if the last step was applied.
        spikes: steps that were skipped for a loss that was finite but too high.
        left_out: steps whose batches are not trained on.
        went_back_to: the steps of the checkpoints that the run went back to, in order.
        losses: of the last steps that were applied, where losses are compared.
    """

    in_a_row: list[int] = field(default_factory=list)
    spikes: int = 0
    left_out: list[int] = field(default_factory=list)
    went_back_to: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Guard:
    """What `train.loss_spike_factor`, `max_skipped_steps` and `on_skipped_steps` ask for."""

    def __init__(self, config: TrainConfig, lapses: Lapses) -> None:
        """`lapses` are those of the run, and kept up to date."""
        self._config, self._lapses = config, lapses

    @property
    def rewinds(self) -> bool:
        """Whether the run may go back to a checkpoint."""
        return self._config.on_skipped_steps == "rewind"

    @property
    def highest_loss(self) -> float:
        """A step with a higher loss is skipped."""
        factor, losses = self._config.loss_spike_factor, self._lapses.losses
        return (
            math.inf if factor is None or len(losses) < FEWEST_LOSSES else factor * statistics.median(losses)
        )

    @property
    def had_enough(self) -> bool:
        """Whether too many steps were skipped, one after the other."""
        return len(self._lapses.in_a_row) >= self._config.max_skipped_steps

    @property
    def names_rows(self) -> bool:
        """Whether the rows of a step that was just skipped are worth a look."""
        return len(self._lapses.in_a_row) <= NAMED

    def leaves_out(self, step: int) -> bool:
        """Whether the batch of a step is not trained on."""
        return step in self._lapses.left_out

    def note(self, row: Mapping[str, Any]) -> None:
        """Remembers a step, from its row of metrics.jsonl."""
        lapses = self._lapses
        if row["skipped"]:
            lapses.in_a_row.append(row["step"])
            lapses.spikes += _is_finite(row)
            return
        lapses.in_a_row.clear()
        if self._config.loss_spike_factor is not None:
            lapses.losses = [*lapses.losses, row["loss"]][-MEDIAN_OVER:]

    def describe(self, row: Mapping[str, Any]) -> str:
        """Why a step was skipped, from its row of metrics.jsonl."""
        if _is_finite(row):
            why = f"the loss is {row['loss']:.4g}, more than {self.highest_loss:.4g}"
            return f"step {row['step']}: {why} (train.loss_spike_factor); not applied"
        what = "gradient" if math.isfinite(row["loss"]) else "loss"
        value = row["grad_norm"] if what == "gradient" else row["loss"]
        return f"step {row['step']}: the {what} is not finite ({value}); not applied"

    def stop(self, rows: Mapping[int, str], why: str = "") -> UserError:
        """The end of a run that had enough.

        Args:
            rows: of some of the steps, a line each.
            why: it is not gone back.
        """
        skipped = self._lapses.in_a_row
        lines = [
            f"train.max_skipped_steps = {self._config.max_skipped_steps}: steps {skipped[0]} to {skipped[-1]} were "
            "skipped, one after the other, for their loss or gradient was not finite or the loss a spike; they changed "
            f"nothing.{why}"
        ]
        lines += [f"  step {step}: {text}" for step, text in rows.items()]
        lines.append(
            "Look at the rows (raytune-ds data --run DIR --step N). Then start the same command again, with "
            "train.on_skipped_steps=rewind to leave these batches out, or begin a new run with a lower "
            "train.learning_rate or without those rows."
        )
        return UserError("\n".join(lines))

    def go_back(self, step: int, earlier: Lapses, rows: Mapping[int, str]) -> str:
        """Remembers that the run goes on from the checkpoint of `step`, and what it leaves out from there on.

        Where the same checkpoint is come back to, what went wrong was not in the skipped batches alone: then all since
        the checkpoint are left out, and after that there is nothing left to try.

        Args:
            step: of the checkpoint.
            earlier: what the run remembered then.
            rows: see `stop`.

        Returns:
            What is done, in words.

        Raises:
            UserError: the third time.
        """
        lapses = self._lapses
        before = lapses.went_back_to.count(step)
        if before > 1:
            raise self.stop(rows, f" It went back to the checkpoint of step {step} twice before.")
        bad = list(range(step + 1, lapses.in_a_row[-1] + 1)) if before else lapses.in_a_row
        text = (
            f"steps {lapses.in_a_row[0]} to {lapses.in_a_row[-1]} were skipped, one after the other: back to the "
            f"checkpoint of step {step}, and on without the batches of steps {bad[0]} to {bad[-1]}"
        )
        lapses.left_out = sorted({*lapses.left_out, *bad})
        lapses.went_back_to = [*lapses.went_back_to, step]
        lapses.in_a_row, lapses.spikes, lapses.losses = [], earlier.spikes, list(earlier.losses)
        return text


def _is_finite(row: Mapping[str, Any]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
