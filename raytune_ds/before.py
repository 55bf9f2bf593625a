"""The model that a run began with: its commit on the hub, and whether it is what a switched-off adapter leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raytune_ds import catalog
from raytune_ds.config import ModelConfig
from raytune_ds.rundir import RunDir

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        model: names it, and says how it is held.
        revision: the commit of a model of the hub; None: the newest.
    """

    model: ModelConfig
    revision: str | None = None


def comes_back(adapter: PeftConfig) -> bool:
    """Whether switching an adapter off gives the base model back: peft leaves biases as they were tuned."""
    return bool(getattr(adapter, "bias", "none") == "none")


def commit(run: RunDir, name: str) -> str | None:
    """The commit of a model of the hub that a run was trained on.

    Args:
        run: the run, whose newest checkpoint tells.
        name: of the model.

    Returns:
        None where the checkpoints are gone, or it is no model of the hub.
    """
    try:
        manifest = catalog.newest_complete(run.checkpoints)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return commit_in(str(manifest.identity.get("model.weights", "")) if manifest else "", name)


def commit_in(weights: str, name: str) -> str | None:
    """The commit that tells the weights of a model of the hub from others, as a run's identity has it; None: none."""
    found = weights.removeprefix(f"{name}@")
    return None if found in (weights, "None") else found
