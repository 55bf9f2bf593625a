"""What is exported: the model or adapter of a finished run, or several adapters made one, and where it comes from."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_ds import checkpoint, combine, storage
from raytune_ds.config import ModelConfig
from raytune_ds.data.order import Place
from raytune_ds.errors import UserError
from raytune_ds.logits import MAX_DOCUMENTS
from raytune_ds.model.weights import fingerprint, locate
from raytune_ds.rundir import RunDir
from raytune_ds.trained import Trained


@dataclass(frozen=True)
class Origin:
    """Where an export comes from.

    Attributes:
        folder: the peft directory, or that of a whole model.
        base: the base model of an adapter, quantised as it was in training; None for a whole model.
        revision: the commit of a base model of the hub.
        facts: its lineage, name and value, for the model card.
        documents: token ids of what it was trained on; none if that is gone.
        results: of evaluations.
    """

    folder: Path
    base: ModelConfig | None
    revision: str | None = None
    facts: tuple[tuple[str, str], ...] = ()
    documents: tuple[Sequence[int], ...] = ()
    results: tuple[Mapping[str, Any], ...] = field(default=())


@contextlib.contextmanager
def of_run(path: str) -> Iterator[Origin]:
    """What a finished run has left in its final/, on this machine.

    Raises:
        UserError: it is no finished run, or its base model is gone or not what it was.
    """
    run = RunDir(storage.absolute(path))
    config = storage.read_json(run.config)
    if config is None:
        raise UserError(f"--run {path}: no run directory (it has no config.json).")
    if not storage.exists(run.final):
        raise UserError(
            f"--run {path}: the run has not finished (no final/). Start the same command again to go on."
        )
    with _local(run.final) as folder:
        yield _origin(run, config, folder)


@contextlib.contextmanager
def of_adapters(
    paths: Sequence[str], combination: str, weights: Sequence[float], density: float | None, seed: int
) -> Iterator[Origin]:
    """Several adapters of one base model, combined.

    Args:
        paths: peft directories, or runs that trained an adapter.
        combination: one of combine.COMBINATIONS.
        weights: one an adapter.
        density: share of values that is kept, by the combinations that prune.
        seed: of what DARE drops.

    Raises:
        UserError: they can't be combined.
    """
    with contextlib.ExitStack() as opened:
        folders = [opened.enter_context(_local(_adapter_below(path))) for path in paths]
        base = ModelConfig(name=combine.base_of(folders))
        combined = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="raytune-combined-")))
        combine.combine(folders, base, combination, weights, density, seed, combined)
        _copy_tokenizer(folders[0], combined)
        facts = (
            ("base model", base.name),
            *(
                (f"adapter {n + 1}", f"{p}, weight {w:g}")
                for n, (p, w) in enumerate(zip(paths, weights, strict=True))
            ),
            ("combination", combination + (f", density {density:g}" if density is not None else "")),
            *((("seed", str(seed)),) if "dare" in combination else ()),
        )
        yield Origin(combined, base, facts=facts)


def _origin(run: RunDir, config: Mapping[str, Any], folder: Path) -> Origin:
    identity, documents = _known(run)
    weights, quantization = (
        str(identity.get("model.weights", "")),
        config["model"].get("quantization", "none"),
    )
    facts = [
        ("run", run.name),
        ("base model", str(config["model"]["name"])),
        ("base model's fingerprint", weights),
        ("data fingerprint", str(identity.get("data", ""))),
        ("seed", str(config["run"]["seed"])),
        ("base model held in", "" if quantization == "none" else quantization),
    ]
    base, revision = None, None
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = ModelConfig.model_validate(config["model"] | {"name": adapter["base_model_name_or_path"]})
        _require_same_base(base, weights)
        commit = weights.rpartition("@")[2] if weights.startswith(f"{base.name}@") else "None"
        revision = None if commit == "None" else commit
    return Origin(
        folder,
        base,
        revision,
        tuple((name, value) for name, value in facts if value),
        documents,
        _results(run),
    )


def _known(run: RunDir) -> tuple[dict[str, Any], tuple[Sequence[int], ...]]:
    """What the newest checkpoint says the run was made with, and a few documents; nothing where that is gone."""
    try:
        manifest = checkpoint.newest_complete(run.checkpoints)
    except (OSError, ValueError, KeyError, TypeError):
        manifest = None
    if manifest is None:
        return {}, ()
    try:
        trained = Trained.read(run.path)
    except UserError:  # the prepared data are gone
        return manifest.identity, ()
    store = trained.store
    split = "eval" if store.split("eval").num_packs else "train"
    pack = store.reader(split).pack(Place(0, 0))
    documents, start = [], 0
    for length in pack["lengths"][:MAX_DOCUMENTS]:
        documents.append(pack["ids"][start : start + length].tolist())
        start += int(length)
    return trained.identity, tuple(documents)


def _require_same_base(base: ModelConfig, weights: str) -> None:
    folder = Path(base.name)
    if folder.is_dir() and weights and "@" not in weights and fingerprint(folder) != weights:
        raise UserError(
            f"{base.name}: is not the base model that the adapter was trained on: its files have changed since "
            f"(fingerprint {fingerprint(folder)}, and {weights} then). Bring the old ones back."
        )


def _results(run: RunDir) -> tuple[Mapping[str, Any], ...]:
    """Those of evaluation.json, as far as they can be read."""
    try:
        found = storage.read_json(f"{run.path}/evaluation.json")
    except (OSError, ValueError):
        return ()
    results = found.get("results") if isinstance(found, dict) else None
    return tuple(each for each in results if isinstance(each, dict)) if isinstance(results, list) else ()


def _adapter_below(path: str) -> str:
    """The peft directory of a run, or `path` where it is one itself."""
    there = storage.absolute(path)
    for folder in (there, f"{there}/final"):
        if storage.exists(f"{folder}/adapter_config.json"):
            return folder
    raise UserError(f"--merge-adapters {path}: holds no adapter, neither there nor in final/ below it.")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(("adapter_", "README"))
            and not (target / file.name).exists()
        ):
            (target / file.name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def _local(folder: str) -> Iterator[Path]:
    """A folder anywhere as one on this machine: as it is, or a copy that goes away afterwards."""
    if storage.is_local(folder):
        yield Path(storage.absolute(folder))
        return
    with tempfile.TemporaryDirectory(prefix="raytune-export-") as scratch:
        for name in storage.list_names(folder):
            storage.copy(f"{folder}/{name}", f"{scratch}/{name}")
        yield Path(scratch)


def base_folder(origin: Origin) -> Path | None:
    """The base model's directory on this machine; None for a whole model."""
    return None if origin.base is None else locate(origin.base, origin.revision)
