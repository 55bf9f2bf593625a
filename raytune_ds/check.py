"""What can be tried before Ray is asked for anything: storage, names, data files, model, targets."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from raytune_ds import storage
from raytune_ds.adapterreport import AdapterReport
from raytune_ds.assignment import Base
from raytune_ds.compatible import EIGHT_BIT, conflicts
from raytune_ds.compose import replaced
from raytune_ds.config import Config, ModelConfig
from raytune_ds.console import say
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.demo.data import domain_rows, write_rows
from raytune_ds.errors import UserError
from raytune_ds.found import Found, keep, key_of, recall
from raytune_ds.model.folder import fingerprint
from raytune_ds.rundir import RunDir


@dataclass(frozen=True)
class Checked:
    """A config whose storage, data files and model are there and fit together; Ray has not been asked for anything yet.

    Attributes:
        config: with the bundled data named where it named none.
        root: the absolute storage.
        inputs: the data files.
        model: with a directory in place of a tiny model's name.
        tokenizer: of the model.
        report: what will be trained and what not.
        base: what was found of the model.
        ds_config: the user's own DeepSpeed config.
    """

    config: Config
    root: str
    inputs: Inputs
    model: ModelConfig
    tokenizer: TokenizerSpec
    report: AdapterReport
    base: Base
    ds_config: dict[str, Any] | None


def check(config: Config, to_train: bool = True) -> Checked:
    """Tries all that can be tried without Ray, the quick things first, and says what it finds.

    Args:
        config: composed.
        to_train: False where the data are only to be looked at: rows that no objective trains on yet may be among them.

    Raises:
        UserError: anything the user can mend.
    """
    root = _check_storage(config)
    _check_name(config, root)
    _check_trackers(config)
    ds_config = _check_engine(config)
    _check_optimizer(config)
    config = _with_default_data(config, root)
    inputs = Inputs.find(config.data)
    inputs.require_formats_of(config.objective.kind, to_train)
    for line in inputs.summary():
        say(f"data: {line}")
    model = _located(config, inputs, root)
    tokenizer = TokenizerSpec.of(model, config.data.chat_template)
    found = _found(config, model, tokenizer, root, _fingerprint(model))
    return Checked(
        config=_settled(config, model, found),
        root=root,
        inputs=inputs,
        model=model,
        tokenizer=replace(tokenizer, traits=found.traits),
        report=found.report,
        base=found.base,
        ds_config=ds_config,
    )


def vary(base: Checked, config: Config) -> Checked:
    """What `check` finds for a config that was made from a checked one; what they share is not looked for again.

    Raises:
        UserError: anything the user can mend.
    """
    _check_optimizer(config)
    same_data = config.data == base.config.data
    same_model = same_data and (config.model, config.run.seed) == (base.config.model, base.config.run.seed)
    inputs = base.inputs if same_data else Inputs.find(config.data)
    inputs.require_formats_of(config.objective.kind)
    model = base.model if same_model else _located(config, inputs, base.root)
    if same_model and config.adapter == base.config.adapter:
        return replace(base, config=config, inputs=inputs, ds_config=_vary_engine(base, config))
    tokenizer = base.tokenizer if same_model else TokenizerSpec.of(model, config.data.chat_template)
    known = base.base.fingerprint if same_model and base.base.revision is None else _fingerprint(model)
    found = _found(config, model, tokenizer, base.root, known)
    weights = found.base
    if same_model:  # at the commit that the first look found, wherever this trial runs
        weights = replace(base.base, total=weights.total, trainable=weights.trainable)
    return Checked(
        config=_settled(config, model, found),
        root=base.root,
        inputs=inputs,
        model=model,
        tokenizer=replace(tokenizer, traits=found.traits),
        report=found.report,
        base=weights,
        ds_config=_vary_engine(base, config),
    )


def _found(
    config: Config, model: ModelConfig, tokenizer: TokenizerSpec, root: str, weights: str | None
) -> Found:
    """What an earlier launch found of the model, or a look at it; `weights` is the fingerprint of its folder.

    Raises:
        UserError: there is no such model, or it does not go with the config.
    """
    key = key_of(config, model, weights, tokenizer) if weights else None
    if key is not None and (found := recall(root, key)) is not None:
        return found
    from raytune_ds.look import look  # torch takes seconds to import

    found = look(config, model, weights, tokenizer, root)
    if key is not None:
        keep(root, key, found)
    return found


def _fingerprint(model: ModelConfig) -> str | None:
    """Of the weights of a model directory; None for one of the hub, and for a folder without a config.

    Raises:
        UserError: they can't be read.
    """
    folder = Path(model.name)
    if not (folder / "config.json").is_file():
        return None
    try:
        return fingerprint(folder)
    except OSError as error:
        raise UserError(f"model.name = {folder}: can't be read: {error}") from error


def _settled(config: Config, model: ModelConfig, found: Found) -> Config:
    """The config as workers are told it; they run in other folders, as whoever reads config.json does."""
    name = model.name if Path(config.model.name).expanduser().is_dir() else config.model.name
    return replaced(config, model={"name": name}, adapter=found.adapter.model_dump(mode="json"))


def _vary_engine(base: Checked, config: Config) -> dict[str, Any] | None:
    """The user's own DeepSpeed config; its file is read on the driver alone, where it lies.

    Raises:
        UserError: it contradicts ours.
    """
    if config.engine != base.config.engine:
        return _check_engine(config)
    if config.engine.asks_for_zero:
        from raytune_ds.engines.ds import config as dsconfig

        dsconfig.check(base.ds_config, config.train, config.engine, dtype=config.model.dtype)
    return base.ds_config


def _check_storage(config: Config) -> str:
    """The absolute storage root, after writing to it.

    Raises:
        UserError: it can't be written.
    """
    root = storage.absolute(config.run.storage)
    if "?" in root:
        raise UserError(
            f"run.storage = {config.run.storage}: a query can't be followed by file names. Set region and endpoint in "
            "the environment of the nodes instead (AWS_REGION, AWS_ENDPOINT_URL)."
        )
    try:
        storage.check_writable(root)
    except (OSError, ValueError) as error:
        raise UserError(
            f"run.storage = {config.run.storage}: can't be written: {error}\nSet run.storage to a place that can."
        ) from error
    return root


def _check_trackers(config: Config) -> None:
    """Workers start them; a missing package is told here, before any of them has started."""
    missing = [name for name in config.tracking.to if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"tracking.to: {', '.join(missing)}: not installed; pip install 'raytune_ds[track]'")


def _check_engine(config: Config) -> dict[str, Any] | None:
    """The user's own DeepSpeed config, if DeepSpeed is asked for.

    Raises:
        UserError: DeepSpeed is not installed, or its config contradicts ours.
    """
    engine = config.engine
    if not engine.asks_for_zero:
        return None
    from raytune_ds.engines.ds import config as dsconfig

    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine: its keys ask for DeepSpeed (kind=zero, stage, config or offload=optimizer), and "
            "deepspeed is not installed; pip install deepspeed, or set engine.kind=fsdp"
        )
    given = dsconfig.load(engine.config) if engine.config is not None else None
    dsconfig.check(given, config.train, engine, dtype=config.model.dtype)
    return given


def _check_optimizer(config: Config) -> None:
    """Raises UserError where what 8-bit AdamW comes from is not installed, or can't be what it is asked to."""
    optim = config.train.optim
    if optim in EIGHT_BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"train.optim = {optim}: bitsandbytes is not installed; pip install 'raytune_ds[quantization]'"
        )
    if config.scaling.use_gpu is False:
        for reason in conflicts({"train.optim": optim, "device": "cpu"}):
            raise UserError(f"{reason} (scaling.use_gpu is false)")


def _with_default_data(config: Config, root: str) -> Config:
    """The bundled demo data where the config names none."""
    if config.data.sources is not None:
        return config
    if config.objective.kind != "sft":
        raise UserError(
            f"objective.kind = {config.objective.kind}: the bundled data are for sft; set data.sources."
        )
    path = Path(_local_root(root)) / ".demo" / "prescriptions.jsonl"
    write_rows(domain_rows(), path)
    return replaced(config, data={"sources": [{"path": str(path), "format": "alpaca"}]})


def _check_name(config: Config, root: str) -> None:
    """Whether the run directory may be used, as `run.resume` says.

    Raises:
        UserError: it is there and must not be, or the other way round, or it is no run directory.
    """
    name = config.run.name
    run = RunDir(f"{root}/{name}") if name else None
    there = run is not None and not run.is_new
    if there and config.run.resume == "never":
        raise UserError(f"run.name = {name}: {root}/{name} is there already, and run.resume is never.")
    if not there and config.run.resume == "must":
        raise UserError(
            f"run.name = {name}: there is no such run in {root} to resume, and run.resume is must."
        )
    if there and run is not None and not storage.exists(run.config):
        raise UserError(
            f"run.name = {name}: {root}/{name} is there but is no run directory; choose another name."
        )


def _located(config: Config, inputs: Inputs, root: str) -> ModelConfig:
    """The model with an absolute directory for its name, unless it is of the hub."""
    name = config.model.name
    if name.startswith("tiny:"):
        name = str(_build_tiny(config, inputs, root))
    elif Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().absolute())
    return config.model.model_copy(update={"name": name})


def _build_tiny(config: Config, inputs: Inputs, root: str) -> Path:
    architecture = config.model.name.removeprefix("tiny:")
    key = xxhash.xxh3_64_hexdigest("/".join((architecture, str(config.run.seed), *inputs.contents)).encode())
    target = Path(_local_root(root)) / ".models" / f"tiny-{architecture}-{key}"
    if target.exists():
        return target
    from raytune_ds.model import tiny

    return tiny.build(architecture, inputs.sample_texts, config.run.seed, target)


def _local_root(root: str) -> str:
    """Where things go that have to be files: the storage itself, or the default one where that is an object store."""
    return root if storage.is_local(root) else str(Path("~/raytune_ds").expanduser())
