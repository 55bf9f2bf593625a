"""What of an adapter's config the model, and an adapter that is there already, decide."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from raytune_ds import storage
from raytune_ds.adapterconfig import PLANNING, AdapterConfig
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.model import initial
from raytune_ds.rundir import RunDir


def settled(config: Config, base_model: PreTrainedModel, root: str) -> tuple[AdapterConfig, Any]:
    """The adapter as workers are told it.

    Args:
        config: composed.
        base_model: without weights.
        root: the absolute storage.

    Returns:
        It, and the peft config of the adapter that training goes on from, None where there is none.

    Raises:
        UserError: there is no such adapter, or it does not go with the rest.
    """
    adapter, made = config.adapter, None
    if adapter.path is not None:
        adapter, made = _of(adapter, adapter.path, config.run.name, root)
    added = config.model.add_tokens + config.model.add_special_tokens
    if added and adapter.kind != "none":
        adapter = _with_trained_tokens(adapter, base_model, made)
    return adapter, made


def _of(config: AdapterConfig, path: str, run: str | None, root: str) -> tuple[AdapterConfig, Any]:
    """What makes the adapter at `path`, and its peft config; of the run's own copy, where it has one."""
    path = storage.absolute(path)
    kept = RunDir(f"{root}/{run}").initial
    there = run is not None and storage.exists(f"{kept}/{initial.MADE_FOR}")
    made = initial.read_config(kept if there else path)
    kind = str(made.peft_type.value).lower()
    if kind in PLANNING:
        raise UserError(
            f"adapter.path = {path}: {kind} plans by the length of its run, so it can't be gone on from."
        )
    return AdapterConfig(kind=kind, path=path, loraplus_lr_ratio=config.loraplus_lr_ratio), made


def _with_trained_tokens(config: AdapterConfig, base_model: PreTrainedModel, made: Any) -> AdapterConfig:
    """The adapter with the embedding and the head trained whole beside it, because tokens are added.

    Raises:
        UserError: the two are one, or the adapter that training goes on from does not have them.
    """
    if base_model.config.tie_word_embeddings:
        raise UserError(
            "model.add_tokens: this model's embedding and output head are one, which an adapter would train apart; set "
            "adapter.kind=none, or take a model in which they are two."
        )
    trained = (base_model.get_input_embeddings(), base_model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in base_model.named_modules() if module in trained]
    if made is None:
        whole = tuple(dict.fromkeys((*config.modules_to_save, *names)))
        return AdapterConfig.model_validate({**config.model_dump(), "modules_to_save": whole})
    if missing := [name for name in names if name not in (made.modules_to_save or ())]:
        raise UserError(
            f"model.add_tokens: the adapter at adapter.path does not train {' and '.join(missing)} whole, so the new "
            "tokens would never be learnt; begin a new adapter."
        )
    return config
