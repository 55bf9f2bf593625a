"""What of a config the model, and an adapter that is there already, decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from raytune_ds import storage
from raytune_ds.adapterconfig import PLANNING, AdapterConfig
from raytune_ds.compose import replaced
from raytune_ds.config import Config, ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import initial
from raytune_ds.rundir import RunDir


def settled(
    config: Config, located: ModelConfig, base_model: PreTrainedModel, root: str
) -> tuple[Config, Any]:
    """The config as workers are told it.

    Args:
        config: composed.
        located: the model, a directory in place of its name.
        base_model: without weights.
        root: the absolute storage.

    Returns:
        The config, and the peft config of the adapter that training goes on from, None where there is none.

    Raises:
        UserError: there is no such adapter, or it does not go with the rest.
    """
    if (
        Path(config.model.name).expanduser().is_dir()
    ):  # workers, and who reads config.json, run in other folders
        config = replaced(config, model={"name": located.name})
    made = None
    if config.adapter.path is not None:
        config, made = _with_adapter(config, config.adapter.path, root)
    return _with_trained_tokens(config, base_model, made), made


def _with_adapter(config: Config, path: str, root: str) -> tuple[Config, Any]:
    """The config with the kind of the adapter at `path`, and its peft config; the run's own copy, where it has one."""
    path = storage.absolute(path)
    kept = RunDir(f"{root}/{config.run.name}").initial
    there = config.run.name is not None and storage.exists(f"{kept}/{initial.MADE_FOR}")
    made = initial.read_config(kept if there else path)
    kind = str(made.peft_type.value).lower()
    if kind in PLANNING:
        raise UserError(
            f"adapter.path = {path}: {kind} plans by the length of its run, so it can't be gone on from."
        )
    adapter = AdapterConfig(kind=kind, path=path, loraplus_lr_ratio=config.adapter.loraplus_lr_ratio)
    return replaced(config, adapter=adapter.model_dump(mode="json")), made


def _with_trained_tokens(config: Config, base_model: PreTrainedModel, made: Any) -> Config:
    """The config with the embedding and the head trained whole beside an adapter, where tokens are added.

    Raises:
        UserError: the two are one, or the adapter that training goes on from does not have them.
    """
    added = config.model.add_tokens + config.model.add_special_tokens
    if not added or config.adapter.kind == "none":
        return config
    if base_model.config.tie_word_embeddings:
        raise UserError(
            "model.add_tokens: this model's embedding and output head are one, which an adapter would train apart; set "
            "adapter.kind=none, or take a model in which they are two."
        )
    trained = (base_model.get_input_embeddings(), base_model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in base_model.named_modules() if module in trained]
    if made is None:
        whole = dict.fromkeys((*config.adapter.modules_to_save, *names))
        return replaced(config, adapter={"modules_to_save": [*whole]})
    if missing := [name for name in names if name not in (made.modules_to_save or ())]:
        raise UserError(
            f"model.add_tokens: the adapter at adapter.path does not train {' and '.join(missing)} whole, so the new "
            "tokens would never be learnt; begin a new adapter."
        )
    return config
