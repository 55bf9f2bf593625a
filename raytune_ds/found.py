"""What was found of a model, kept below the storage, so that a launch with the same model and adapter needs no torch.

<storage>/.found/<key>.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from raytune_ds import storage
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.adapterreport import AdapterReport
from raytune_ds.assignment import Base
from raytune_ds.config import Config, ModelConfig
from raytune_ds.data.tokenizer import TokenizerSpec, Traits
from raytune_ds.model.folder import digest_beside_weights

FOLDER = ".found"
_MAKERS = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class Found:
    """What a model and a config decide together.

    Attributes:
        adapter: as workers are told it.
        report: what will be trained and what not.
        base: of the model.
        traits: of its tokenizer.
    """

    adapter: AdapterConfig
    report: AdapterReport
    base: Base
    traits: Traits


_FOUND = TypeAdapter(Found)


def key_of(config: Config, model: ModelConfig, fingerprint: str, tokenizer: TokenizerSpec) -> str | None:
    """What all of it depends on; None where nothing tells that.

    Args:
        config: composed.
        model: with a directory in place of its name.
        fingerprint: of its weights.
        tokenizer: of the model.
    """
    if model.trust_remote_code or config.adapter.path is not None:
        return None  # a model's own code may look at anything, and an adapter's directory may be another one
    try:
        beside = digest_beside_weights(Path(model.name))
    except OSError:
        return None
    state = {
        "made by": [_own_code(), *map(_version, _MAKERS)],
        "weights": fingerprint,
        "beside": beside,
        "model": model.model_dump(mode="json", exclude={"name"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "tokenizer": asdict(tokenizer) | {"name": None, "traits": None},
    }
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def recall(root: str, key: str) -> Found | None:
    """What was kept below the storage `root`; None if nothing was."""
    try:
        return _FOUND.validate_json(storage.read_bytes(f"{root}/{FOLDER}/{key}.json"))
    except (OSError, ValidationError):
        return None


def keep(root: str, key: str, found: Found) -> None:
    """For `recall`; where it can't be written, the next launch looks again."""
    with contextlib.suppress(OSError):
        storage.make_dir(f"{root}/{FOLDER}")
        storage.write_bytes(f"{root}/{FOLDER}/{key}.json", _FOUND.dump_json(found))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _own_code() -> str:
    """Tells this code from any other."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
