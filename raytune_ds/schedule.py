"""The learning rate of each step, as a pure function: a resume needs no scheduler state."""

from __future__ import annotations

from collections.abc import Callable

from raytune_ds.config import TrainConfig


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Optimizer steps with a rising learning rate."""
    return round(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps


def lr_multiplier(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Transformers' schedule of that name: step (0-based) to a factor of the peak learning rate."""
    import torch
    from transformers import get_scheduler

    # The schedules are functions of the step inside LambdaLR; the optimizer is only there to be asked for.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(config, total_steps),
        num_training_steps=total_steps,
    )
    multiplier = scheduler.lr_lambdas[0]  # type: ignore[attr-defined]  # every type that config admits is a LambdaLR
    return lambda step: float(multiplier(step))
