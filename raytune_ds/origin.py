"""What is exported: the model or adapter of a finished run, or several adapters made one, and where it comes from."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ds import catalog, combine, storage
from raytune_ds.before import commit_in
from raytune_ds.config import ModelConfig
from raytune_ds.data.order import Place
from raytune_ds.errors import UserError
from raytune_ds.logits import MAX_DOCUMENTS
from raytune_ds.model.folder import fingerprint
from raytune_ds.model.weights import locate
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
        began_with: the model that a whole model was made from; None where that is unknown.
    """

    folder: Path
    base: ModelConfig | None
    revision: str | None = None
    facts: tuple[tuple[str, str], ...] = ()
    documents: tuple[Sequence[int], ...] = ()
    began_with: ModelConfig | None = None


@contextlib.contextmanager
def of_run(path: str) -> Iterator[Origin]:
    """What a finished run has left in its final/, on this machine.

    Raises:
        UserError: it is no finished run, or its base model is gone or not what it was.
    """
    run, config = RunDir.finished(path)
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
        places = [_adapter_below(path) for path in paths]
        folders = [opened.enter_context(_local(place)) for place in places]
        base, revision, of_base = _shared(paths, places, combine.base_of(folders))
        combined = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="raytune-combined-")))
        combine.combine(folders, base, combination, weights, density, seed, combined)
        _copy_tokenizer(folders[0], combined)
        facts = (
            *of_base,
            *(
                (f"adapter {n + 1}", f"{p}, weight {w:g}")
                for n, (p, w) in enumerate(zip(paths, weights, strict=True))
            ),
            ("combination", combination + (f", density {density:g}" if density is not None else "")),
            *((("seed", str(seed)),) if "dare" in combination else ()),
        )
        yield Origin(combined, base, revision, facts)


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
    model = ModelConfig.model_validate(config["model"])
    base = None
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = model.model_copy(update={"name": adapter["base_model_name_or_path"]})
        _require_same_base(base, weights)
    return Origin(
        folder,
        base,
        commit_in(weights, (base or model).name),
        tuple((name, value) for name, value in facts if value),
        documents,
        None if base else model,
    )


def _known(run: RunDir) -> tuple[dict[str, Any], tuple[Sequence[int], ...]]:
    """What the newest checkpoint says the run was made with, and a few documents; nothing where that is gone."""
    identity = _identity(run)
    if not identity:
        return {}, ()
    try:
        trained = Trained.read(run.path)
    except UserError:  # the prepared data are gone
        return identity, ()
    store = trained.store
    split = "eval" if store.split("eval").num_packs else "train"
    pack = store.reader(split).pack(Place(0, 0))
    documents, start = [], 0
    for length in pack["lengths"][:MAX_DOCUMENTS]:
        documents.append(pack["ids"][start : start + length].tolist())
        start += int(length)
    return trained.identity, tuple(documents)


def _identity(run: RunDir) -> dict[str, Any]:
    """What the newest checkpoint says the run was made with; empty where there is none."""
    try:
        manifest = catalog.newest_complete(run.checkpoints)
    except (OSError, ValueError, KeyError, TypeError):
        manifest = None
    return dict(manifest.identity) if manifest else {}


def _require_same_base(base: ModelConfig, weights: str) -> None:
    folder = Path(base.name)
    if folder.is_dir() and weights and "@" not in weights and fingerprint(folder) != weights:
        raise UserError(
            f"{base.name}: is not the base model that the adapter was trained on: its files have changed since "
            f"(fingerprint {fingerprint(folder)}, and {weights} then). Bring the old ones back."
        )


def _shared(
    paths: Sequence[str], places: Sequence[str], name: str
) -> tuple[ModelConfig, str | None, tuple[tuple[str, str], ...]]:
    """The base model that all adapters were trained on, its commit, and both as facts.

    A folder that is no run's own does not say how its base model was held: unquantised, that is.

    Args:
        paths: as the user names them.
        places: their peft directories.
        name: of the base model.

    Raises:
        UserError: they were trained on several, or on one that is held in several ways.
    """
    runs = [RunDir.of_final(place) for place in places]
    models = [ModelConfig.model_validate((run[1]["model"] if run else {}) | {"name": name}) for run in runs]
    told = [str(_identity(run[0]).get("model.weights", "")) if run else "" for run in runs]
    _require_one(
        paths,
        ["full precision" if m.quantization == "none" else m.quantization for m in models],
        "were trained on a base model that was held in",
        "Each makes up for what its own has lost, so they do not add up. Of a folder that was taken out of its run, "
        "name the run instead.",
    )
    known = [(path, weights) for path, weights in zip(paths, told, strict=True) if weights]
    _require_one(
        [path for path, _ in known],
        [weights for _, weights in known],
        "were trained on base models with the fingerprints",
        "The files of the base model have changed between the runs.",
    )
    fingerprint_then = known[0][1] if known else ""
    trusted = any(model.trust_remote_code for model in models)
    base = next((model for model, run in zip(models, runs, strict=True) if run), models[0])
    base = base.model_copy(update={"trust_remote_code": trusted})
    _require_same_base(base, fingerprint_then)
    facts = (
        ("base model", name),
        ("base model's fingerprint", fingerprint_then),
        ("base model held in", "" if base.quantization == "none" else base.quantization),
    )
    return base, commit_in(fingerprint_then, base.name), tuple((key, value) for key, value in facts if value)


def _require_one(paths: Sequence[str], values: Sequence[str], what: str, why: str) -> None:
    if len(set(values)) > 1:
        told = "\n".join(f"  {path}: {value}" for path, value in zip(paths, values, strict=True))
        raise UserError(f"--merge-adapters: the adapters {what}:\n{told}\n{why}")


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
