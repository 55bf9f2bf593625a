"""The models that are compared: loaded once each, and never two at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_ds import generate, storage
from raytune_ds.compose import load
from raytune_ds.config import Config, ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.evaluation.items import BASE, TUNED
from raytune_ds.model.load import compute_dtype, load_for_generation
from raytune_ds.rundir import RunDir
from raytune_ds.trained import base_model


@dataclass(frozen=True)
class Subject:
    """A model to load, and the sides it plays.

    Attributes:
        run: the run directory.
        sides: BASE, TUNED or both: with its adapter switched off, an adapter model is its base.
        model: loaded in place of the run's own; None for that.
    """

    run: str
    sides: tuple[str, ...]
    model: ModelConfig | None = None

    def load(self) -> Any:
        """The model in evaluation mode, on the GPU where there is one.

        Raises:
            UserError: it can't be loaded.
        """
        if self.model is None:
            return generate.Generator.of_run(self.run).model
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return load_for_generation(self.model, compute_dtype("auto", device), device)


@contextlib.contextmanager
def playing(model: Any, side: str) -> Iterator[None]:
    """Makes a loaded model behave as one of its sides."""
    is_adapter = hasattr(model, "disable_adapter")
    with model.disable_adapter() if is_adapter and side == BASE else contextlib.nullcontext():
        yield


def finished(path: str) -> Config:
    """The config of the finished run at `path`.

    Raises:
        UserError: it is none.
    """
    generate.finished(path)
    return load(storage.read_bytes(RunDir(storage.absolute(path)).config).decode())


def subjects(run: str, config: Config, with_base: bool) -> list[Subject]:
    """What has to be loaded, one after the other, for a finished run.

    Args:
        run: the run directory.
        config: of the run.
        with_base: the base model is measured too.

    Raises:
        UserError: the base model of a fully tuned one is gone.
    """
    if config.adapter.kind != "none":
        return [Subject(run, (BASE, TUNED) if with_base else (TUNED,))]
    tuned = Subject(run, (TUNED,))
    return [tuned, Subject(run, (BASE,), _base(run))] if with_base else [tuned]


def _base(run: str) -> ModelConfig:
    try:
        model = base_model(run)
        if Path(model.name).is_absolute() and not Path(model.name).is_dir():
            raise UserError(f"model.name = {model.name}: there is no such directory any more.")
    except UserError as error:
        raise UserError(f"the base model: {error}\n--no-base measures the tuned one alone.") from error
    return model
