"""The user's own ds_config.json, made into what DeepSpeed is really given.

Three things happen to a file as the tutorials have it. What is commonly written in another form than DeepSpeed reads is
put right, with a note. What contradicts the config is refused, all of it at once, each with the key and value of both
sides: every engine gives the same model, so nothing that decides the model may come from the file. Everything else is
passed on as it stands, with "auto" filled in as the Hugging Face trainer does.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.engines.ds import autos, ours, read, refused, slips, stage
from raytune_ds.engines.ds.keys import AUTO, ZERO
from raytune_ds.engines.ds.work import DsConfig, Facts, Offload, Work
from raytune_ds.errors import UserError
from raytune_ds.problems import shortened

_MADE: dict[str, Any] = {ZERO: dict.fromkeys(autos.FROM_HIDDEN_SIZE, AUTO)}  # where there is no file


def load(path: str) -> dict[str, Any]:
    """What is in a ds_config.json.

    Raises:
        UserError: it is not there, is not JSON, gives a key twice, or is no object.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        given = json.loads(text, object_pairs_hook=_each_key_once)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file (engine.config)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}:{error.colno}: is not JSON: {error.msg}. Comments and a comma after the last "
            "entry are the usual cause; JSON has neither."
        ) from None
    except _DuplicateKey as error:
        raise UserError(f"{path}: {error} is set twice in one section; keep one") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None
    except (OSError, ValueError, RuntimeError) as error:  # also a path with a null byte, or of no user's home
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(given, dict):
        raise UserError(
            f'{path}: must be a JSON object of DeepSpeed\'s settings, such as {{"{ZERO}": {{"stage": 2}}}}'
        )
    return given


def check(
    given: dict[str, Any] | None,
    train: TrainConfig,
    engine: EngineConfig,
    *,
    dtype: str = "auto",
    gpu: bool | None = None,
) -> DsConfig:
    """`ds_config` as far as it can be told before there are workers.

    Args:
        given: what `load` read; None: the file is not there to be asked.
        train: of the config.
        engine: of the config.
        dtype: `model.dtype`.
        gpu: whether the workers will have GPUs, where that is known.

    Raises:
        UserError: what would be wrong in every world.
    """
    bf16 = None if dtype == "auto" else dtype == "bfloat16"
    if bf16 is None and gpu is False:
        bf16 = False
    return ds_config(given, Facts(train, engine, bf16=bf16, gpu=gpu))


def ds_config(given: dict[str, Any] | None, facts: Facts) -> DsConfig:
    """What DeepSpeed is given.

    Args:
        given: what `load` read; None: all is made from `engine`.
        facts: of this run.

    Raises:
        UserError: the file contradicts the config, or holds what DeepSpeed does not know; all of it, a line each.
    """
    work = Work(_without_remarks(_MADE if given is None else given), facts, given is not None)
    for step in (
        slips.shapes,
        read.read_sections,
        refused.refuse,
        ours.optimizer,
        ours.scheduler,
        ours.precision,
        ours.gradient_formats,
        ours.batches,
        stage.zero,
        autos.fill_autos,
        autos.gathered,
        autos.always,
        autos.leftover_autos,
    ):
        step(work)
    if work.problems:
        raise UserError("\n".join(work.problems))
    zero = work.values[ZERO]
    offload: Offload = "none"
    if "offload_param" in zero:
        offload = "parameters"
    elif "offload_optimizer" in zero:
        offload = "optimizer"
    return DsConfig(work.values, zero["stage"], offload, tuple(work.notes))


def _without_remarks(tree: Any) -> Any:
    """A copy without null values and without the keys that people use for comments: _comment, // and #."""
    if not isinstance(tree, dict):
        return copy.deepcopy(tree)
    return {
        key: _without_remarks(value)
        for key, value in tree.items()
        if value is not None and not key.startswith(("_", "//", "#"))
    }


class _DuplicateKey(Exception):
    """A key that stands twice in one object."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(shortened(json.dumps(key), 80))
        found[key] = value
    return found
