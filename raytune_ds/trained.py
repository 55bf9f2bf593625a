"""What a run was trained on, from its directory and the prepared store; no Ray, and the run may still be going on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from raytune_ds import catalog, storage
from raytune_ds.before import Base, commit
from raytune_ds.check import check
from raytune_ds.compose import replaced
from raytune_ds.config import Config, ModelConfig
from raytune_ds.data import prepared
from raytune_ds.data.order import Order
from raytune_ds.data.store import Store
from raytune_ds.errors import UserError
from raytune_ds.milestones import Plan
from raytune_ds.rundir import RunDir

FOLDERS_ABOVE = 3
"""A run lies below its storage, the trial of a sweep three folders below it."""


@dataclass(frozen=True)
class Trained:
    """A run and its data.

    Attributes:
        run: its directory.
        config: of config.json.
        store: the prepared data.
        identity: what its newest checkpoint says it was made with; empty if there is none.
        known_steps: that its newest checkpoint or result.json knows to be done.
        rows: of metrics.jsonl, those of optimizer steps.
    """

    run: RunDir
    config: Config
    store: Store
    identity: dict[str, Any]
    known_steps: int
    rows: tuple[dict[str, Any], ...]

    @staticmethod
    def read(path: str) -> Trained:
        """From the run directory at `path`.

        Raises:
            UserError: there is none, it is damaged, or its prepared data are gone.
        """
        run = RunDir(storage.absolute(path))
        try:
            config = _config(run, path)
            manifest = catalog.newest_complete(run.checkpoints)
            identity = manifest.identity if manifest else {}
            store = _store(run, config, identity.get("data"))
            rows = _steps(run)
            known_steps = max(manifest.step if manifest else 0, _steps_of_result(run))
        except (OSError, pa.ArrowInvalid, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: can't be read: {error}") from error
        return Trained(run, config, store, identity, known_steps, rows)

    @property
    def order(self) -> Order:
        """In which the run reads its data."""
        return self.store.order("train", self.config.train.global_batch, self.config.run.seed)

    @property
    def total_steps(self) -> int:
        """Of the whole run, as it is configured now."""
        return Plan.of(self.config, self.order).total_steps


def _config(run: RunDir, path: str) -> Config:
    values = storage.read_json(run.config)
    if values is None and storage.exists(f"{run.path}/sweep.json"):
        raise UserError(
            f"{path}: is a sweep; name runs of it, such as {path.rstrip('/')}/trials/* or {path.rstrip('/')}/promoted."
        )
    if values is None:
        raise UserError(f"{path}: no run directory (it has no config.json).")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{run.config}: is damaged, or of another version of raytune_ds ({key}: {first['msg']})."
        ) from error


def _steps(run: RunDir) -> tuple[dict[str, Any], ...]:
    """The rows of metrics.jsonl that are of optimizer steps."""
    rows = run.read_metrics()
    if wrong := next(
        (row for row in rows if not isinstance(row, dict) or not isinstance(row.get("step"), int)), None
    ):
        raise ValueError(f"{run.metrics} has a line without a step: {wrong}")
    return tuple(row for row in rows if "loss" in row or "left_out" in row)


def _steps_of_result(run: RunDir) -> int:
    result = storage.read_json(run.result) or {}
    return int((result.get("progress") or {}).get("step", 0))


def _store(run: RunDir, config: Config, fingerprint: str | None) -> Store:
    """The store that the run's checkpoints name; of a run without one, that of its config and data files.

    Raises:
        UserError: it is gone.
    """
    if fingerprint is None:
        checked = check(replaced(config, run={"resume": "auto"}))
        fingerprint = prepared.fingerprint_of(checked.config, checked.inputs, checked.tokenizer)
    places = list(dict.fromkeys(f"{root}/{prepared.FOLDER}" for root in _roots(run, config)))
    for place in places:
        if (store := Store.find(f"{place}/{fingerprint}")) is not None:
            return store
    raise UserError(
        f"{run.path}: its prepared data ({fingerprint}) are gone from {places[0]}. If its data files are as they were, "
        f"this prepares them again: raytune-ds data --config {run.config}"
    )


def _roots(run: RunDir, config: Config) -> Iterator[str]:
    """Where its storage may be: as configured, or above the run, should all of it have been moved."""
    yield storage.absolute(config.run.storage)
    folder = run.path
    for _ in range(FOLDERS_ABOVE):
        folder = folder.rpartition("/")[0]
        yield folder


def base_model(path: str) -> ModelConfig:
    """The model that the run at `path` began with, by a name it can be loaded by; a tiny one is made again if need be.

    Raises:
        UserError: there is no such run, or what made its tiny model is gone.
    """
    config = _config(RunDir(storage.absolute(path)), path)
    if not config.model.name.startswith("tiny:"):
        return config.model
    return check(replaced(config, run={"resume": "auto"})).model


def began_with(path: str) -> Base:
    """The model of `base_model`, at the commit that the run was trained on.

    Raises:
        UserError: see base_model.
    """
    model = base_model(path)
    return Base(model, commit(RunDir(storage.absolute(path)), model.name))
