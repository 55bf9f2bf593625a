"""What a worker is told, and what of it has to be the same for a run to go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raytune_ds.adapterconfig import PLANNING, TOTAL_STEPS, AdapterConfig
from raytune_ds.catalog import Manifest
from raytune_ds.config import Config, ModelConfig
from raytune_ds.data.store import Store
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.errors import UserError
from raytune_ds.milestones import Plan
from raytune_ds.rundir import RunDir
from raytune_ds.section import Setting, as_mapping
from raytune_ds.tracking import Group

_WEIGHTS_CHANGED = (
    "\n(model.weights: the files of the base model have changed, or model.name is another model)"
)
# Keys of `train` that a run may be continued with another value of. With more steps the schedule stretches.
MAY_CHANGE = (
    "num_train_epochs",
    "max_steps",
    "micro_batch",
    "activation_checkpointing",
    "eval_steps",
    "logging_steps",
    "profile",
    "optim",
    "torch_compile",
    "loss_spike_factor",
    "max_skipped_steps",
    "on_skipped_steps",
)


@dataclass(frozen=True)
class Base:
    """What was found of the base model before the workers start.

    Attributes:
        fingerprint: tells its weights from others.
        revision: the commit, if it is of the hub.
        total: its parameters, with those of an adapter.
        trainable: those of them that are trained.
        quantized: those of them that are held in few bits.
        quantized_bytes: what these take.
    """

    fingerprint: str
    revision: str | None
    total: int
    trainable: int
    quantized: int = 0
    quantized_bytes: int = 0

    def frozen_bytes(self, each: int) -> int:
        """What is not trained takes, where a parameter that is not quantized takes `each` bytes."""
        return (self.total - self.trainable - self.quantized) * each + self.quantized_bytes


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told.

    Attributes:
        config: resolved.
        model: the same as config.model, with a tiny model's directory in place of its name.
        base: what was found of that model.
        tokenizer: of the model.
        store: prepared.
        run: its directory.
        ds_config: the user's own DeepSpeed config.
        lineage: where its settings, or its first steps, come from, for the model card.
        group: that trackers show the run in.
    """

    config: Config
    model: ModelConfig
    base: Base
    tokenizer: TokenizerSpec
    store: Store
    run: RunDir
    ds_config: dict[str, Any] | None
    lineage: str | None = None
    group: Group | None = None

    @property
    def plan(self) -> Plan:
        """How long the run is."""
        config = self.config
        return Plan.of(config, self.store.order("train", config.train.global_batch, config.run.seed))

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained, with the length of the run for methods that plan by it."""
        adapter = self.config.adapter
        length = Setting(key=TOTAL_STEPS, value=self.plan.total_steps)
        if adapter.kind not in PLANNING or TOTAL_STEPS in as_mapping(adapter.options):
            return adapter
        return adapter.model_copy(update={"options": (*adapter.options, length)})

    @property
    def beginning(self) -> dict[str, Any]:
        """What decides on what an adapter begins with, where that is not drawn."""
        identity = self.identity
        keys = ("run.seed", "model.weights", "model.quantization", "adapter")
        told = {key: identity[key] for key in keys}
        return told | {"adapter": {k: v for k, v in (told["adapter"] or {}).items() if k != "dropout"}}

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on from a checkpoint."""
        config = self.config
        return {
            "run.seed": config.run.seed,
            "model.weights": self.base.fingerprint,
            "model.dtype": self.model.dtype,
            # Not there in checkpoints of before there was a choice.
            "model.quantization": None if self.model.quantization == "none" else self.model.quantization,
            "adapter": told_of(config.adapter) if config.adapter.kind != "none" else None,
            "objective": config.objective.model_dump(mode="json"),
            "data": self.store.manifest.fingerprint,
            "train": config.train.model_dump(mode="json", exclude=set(MAY_CHANGE)),
        }


def told_of(adapter: AdapterConfig) -> dict[str, Any]:
    """Its first keys, and of the later ones, which older checkpoints do not have, those that are not as usual."""
    first = adapter.model_dump(mode="json", include={"kind", "r", "alpha", "dropout", "bias", "targets"})
    later = adapter.model_dump(mode="json", exclude_defaults=True)
    return first | {key: value for key, value in later.items() if value != {}}


def differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, the value there and the value here, of all in which two identities differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys((*here, *there)):
            yield from differences(there.get(name), here.get(name), f"{key}.{name}".lstrip("."))
    elif there != here:
        yield key, there, here


def require_same_run(
    assignment: Assignment, manifest: Manifest, before: dict[str, Any] | None = None
) -> None:
    """Refuses to go on from a checkpoint that was made with other settings.

    Args:
        assignment: of the run.
        manifest: of the checkpoint.
        before: the config that the run had, as config.json holds it, if that is known.

    Raises:
        UserError: naming each difference.
    """
    changed: list[str] = []
    for key, then, now in differences(manifest.identity, assignment.identity):
        changed += _of_the_data(assignment, before) if key == "data" else [f"  {key}: {then} then, {now} now"]
    if changed:
        raise UserError(
            f"run.name = {assignment.run.name}: this run was begun with other settings:\n"
            + "\n".join(changed)
            + _WEIGHTS_CHANGED * any("model.weights" in line for line in changed)
            + "\nSet them back to resume it, or choose another run.name to start anew."
        )


def _of_the_data(assignment: Assignment, before: dict[str, Any] | None) -> list[str]:
    """Why the prepared data is another one."""
    now = assignment.config.model_dump(mode="json")["data"]
    keys = (
        [
            f"  {key}: {then} then, {value} now"
            for key, then, value in differences(before["data"], now, "data")
        ]
        if before
        else []
    )
    return keys or [
        "  data: the files of data.sources have other rows, or the tokenizer makes other tokens of them"
    ]


def harmless_changes(assignment: Assignment, before: dict[str, Any]) -> list[str]:
    """Settings that a run goes on with although they were others, `key: then -> now` each.

    Args:
        assignment: of the run.
        before: the config that the run had, as config.json holds it.
    """
    found = differences(before, assignment.config.model_dump(mode="json"))
    return [f"{key}: {then} -> {now}" for key, then, now in found if not key.startswith("run.")]
