"""What was found of a model, kept below the storage, so that a launch with the same model and adapter needs no torch.

<storage>/.found/<key>.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
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
_MAKERS = ("torch", "transformers", "tokenizers", "peft")


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
    """What all of it depends on; None where that can't be told without a look.

    Args:
        config: composed.
        model: with a directory in place of its name.
        fingerprint: of its weights.
        tokenizer: of the model.
    """
    folder = Path(model.name)
    if not folder.is_dir() or config.adapter.path is not None:
        return None  # the hub may have something newer, and an adapter's directory another one
    state = {
        "made by": [_own_code(), *map(version, _MAKERS)],
        "weights": fingerprint,
        "beside": digest_beside_weights(folder),
        "model": model.model_dump(mode="json", exclude={"name"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "tokenizer": asdict(tokenizer) | {"name": None},
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


@cache
def _own_code() -> str:
    """Tells this code from any other."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
