"""The models that are compared: loaded once each, and never two at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_ds import generate, storage
from raytune_ds.before import Base, comes_back
from raytune_ds.compose import load
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.evaluation.items import BASE, TUNED
from raytune_ds.model.load import compute_dtype, load_for_generation
from raytune_ds.rundir import RunDir
from raytune_ds.trained import began_with


@dataclass(frozen=True)
class Subject:
    """A model to load, and the sides it plays.

    Attributes:
        run: the run directory.
        sides: BASE, TUNED or both: an adapter model is its base with its adapter off, unless biases were tuned too.
        base: loaded in place of the run's own; None for that.
    """

    run: str
    sides: tuple[str, ...]
    base: Base | None = None

    def load(self) -> Any:
        """The model in evaluation mode, on the GPU where there is one.

        Raises:
            UserError: it can't be loaded.
        """
        if self.base is None:
            return generate.Generator.of_run(self.run).model
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, revision = self.base.model, self.base.revision
        return load_for_generation(model, compute_dtype("auto", device), device, revision=revision)


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
        UserError: the base model is needed by itself, and gone.
    """
    from peft import PeftConfig

    tuned = Subject(run, (TUNED,))
    if not with_base:
        return [tuned]
    if config.adapter.kind != "none" and comes_back(PeftConfig.from_pretrained(f"{run}/final")):
        return [Subject(run, (BASE, TUNED))]
    return [tuned, Subject(run, (BASE,), _base(run))]


def _base(run: str) -> Base:
    try:
        base = began_with(run)
        if Path(base.model.name).is_absolute() and not Path(base.model.name).is_dir():
            raise UserError(f"model.name = {base.model.name}: there is no such directory any more.")
    except UserError as error:
        raise UserError(f"the base model: {error}\n--no-base measures the tuned one alone.") from error
    return base
