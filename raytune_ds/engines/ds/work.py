"""What a ds_config.json is held against, what is made of it, and the state of the pass between the two."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.engines.ds.keys import AUTO, ZERO
from raytune_ds.problems import shortened

Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True)
class Facts:
    """What a ds_config.json is filled from and held against. None: not known yet, so nothing is said about it.

    Attributes:
        train: of the config.
        engine: of the config.
        world_size: number of ranks.
        micro_batch: packs of one forward pass.
        accumulation: micro-batches that a rank computes in one optimizer step.
        global_batch: packs in one optimizer step; the last micro-batches may be smaller, so it is no product of these.
        hidden_size: of the model.
        num_parameters: of the model.
        bf16: the computation is in bfloat16, not float32.
        gpu: the ranks have GPUs.
        total_steps: optimizer steps of the run.
        warmup_steps: of these, with a rising learning rate.
    """

    train: TrainConfig
    engine: EngineConfig
    world_size: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    global_batch: int | None = None
    hidden_size: int | None = None
    num_parameters: int | None = None
    bf16: bool | None = None
    gpu: bool | None = None
    total_steps: int | None = None
    warmup_steps: int | None = None


@dataclass(frozen=True)
class DsConfig:
    """What DeepSpeed is given.

    Attributes:
        values: the whole config; "auto" is left in it only for what the facts did not tell.
        stage: of ZeRO, 1 to 3.
        offload: parameters, where these are offloaded, whether the optimizer is or not.
        notes: what was put right or left out, a sentence each.
    """

    values: dict[str, Any]
    stage: int
    offload: Offload
    notes: tuple[str, ...]

    @property
    def optimizer_on_cpu(self) -> bool:
        """Whether the optimizer's state and its work are offloaded."""
        return "offload_optimizer" in self.values[ZERO]


@dataclass
class Work:
    """The config as far as it has come, and what there is to say about it. Keys are dotted."""

    values: dict[str, Any]
    facts: Facts
    is_file: bool
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def file(self) -> str:
        """What the file is called."""
        return self.facts.engine.config or "the DeepSpeed config"

    def get(self, key: str) -> Any:
        """The value of a key; None: there is none."""
        place: Any = self.values
        for part in key.split(".") if key else ():
            place = place.get(part) if isinstance(place, dict) else None
        return place

    def told(self, key: str) -> Any:
        """The value of a key, None also for "auto"."""
        value = self.get(key)
        return None if value == AUTO else value

    def put(self, key: str, value: Any) -> None:
        """Sets a key, and makes the sections it stands in."""
        *sections, last = key.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value

    def pop(self, key: str) -> Any:
        """Takes a key out."""
        section, _, last = key.rpartition(".")
        place = self.get(section)
        return place.pop(last, None) if isinstance(place, dict) else None

    def said(self, key: str, value: Any = None) -> str:
        """What the file says: 'key = value in file'."""
        return f"{key} = {shown(self.get(key) if value is None else value)} in {self.file}"

    def problem(self, key: str, why: str) -> None:
        """Refuses the value of a key."""
        self.problems.append(f"{self.said(key)}{why}")

    def note(self, text: str) -> None:
        """Something worth knowing that stops nothing."""
        self.notes.append(text)


def shown(value: Any) -> str:
    """A value as JSON has it; a collection may hold anything, so it is not shown."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list) and not all(isinstance(item, int | float) for item in value):
        return "a list"
    return shortened(json.dumps(value))
