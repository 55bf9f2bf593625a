"""How long a run is, and what happens when."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ds.config import Config
from raytune_ds.data.order import Order


@dataclass(frozen=True)
class Plan:
    """How long the run is and what happens when, all in optimizer steps."""

    total_steps: int
    eval_every: int
    checkpoint_every: int
    checkpoint_best: bool
    order: Order

    @staticmethod
    def of(config: Config, order: Order) -> Plan:
        """From the config and the size of the data."""
        train, per_epoch = config.train, order.steps_per_epoch
        total = train.max_steps or max(1, round(train.num_train_epochs * per_epoch))
        every = config.checkpoint.every_steps
        return Plan(
            total_steps=total,
            # The end of every epoch, but of short ones not each.
            eval_every=train.eval_steps or max(per_epoch, -(-total // 20)),
            # A tenth of the run is what a crash may cost, but a long run pays for more than 500 steps at most.
            checkpoint_every=min(500, max(10, -(-total // 10))) if every == "auto" else every,
            # So that the best held-out loss has a checkpoint.
            checkpoint_best=every == "auto",
            order=order,
        )

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is measured after `step`; always at the end."""
        return step % self.eval_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is taken after `step`, whatever the held-out loss; always at the end."""
        return step % self.checkpoint_every == 0 or step == self.total_steps
