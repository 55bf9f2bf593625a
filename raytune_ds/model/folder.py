"""A model directory: which files hold its weights, and what tells it from others. Nothing here needs torch."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import xxhash

from raytune_ds.errors import UserError

PATTERNS = ("*.safetensors", "*.bin")
"""Of weight files; the second only where there is none of the first."""

_SINGLE = {"*.safetensors": "model.safetensors", "*.bin": "pytorch_model.bin"}
_SAMPLES, _SAMPLE_BYTES = 64, 1024
_LARGE = 64 << 20


def files(folder: Path) -> list[Path]:
    """The weight files of a model directory: those of its index where it has one.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    for pattern in PATTERNS:
        if (single := folder / _SINGLE[pattern]).is_file():  # as transformers looks for them
            return [single]
        if indexes := sorted(folder.glob(f"{pattern}.index.json")):
            named = _named_in(indexes[0])
            if missing := sorted(name for name in named if not (folder / name).is_file()):
                raise UserError(
                    f"model.name: {folder}: {indexes[0].name} names files that are not there: {missing[:3]}"
                )
            return [folder / name for name in sorted(named)]
        if found := sorted(path for path in folder.glob(pattern) if _is_model_file(path.name)):
            return found
    raise UserError(f"model.name: {folder}: has no weights (*.safetensors or pytorch_model*.bin).")


def _named_in(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(damaged(index, error)) from error


def _is_model_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in ("model*.safetensors", "pytorch_model*.bin"))


def fingerprint(folder: Path) -> str:
    """Tells one base model from another: a hash of the files' sizes and of samples all over them.

    Whatever retrains or rebuilds a model changes nearly every weight, so samples are enough; hashing all of a large
    model would take minutes.
    """
    digest = xxhash.xxh3_128()
    digest.update((folder / "config.json").read_bytes())
    for path in files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * size // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def digest_beside_weights(folder: Path) -> str:
    """A hash over what lies beside the weights: config, tokenizer, chat templates.

    A file too large to be any of these is told by its size and time: some models bring their weights once more, in
    another form.

    Raises:
        OSError: a file can't be read.
    """
    weights, digest = set(files(folder)), xxhash.xxh3_128()
    beside = [path for path in folder.iterdir() if path.is_file()]
    beside += folder.glob("*/*.jinja")  # where transformers keeps further templates
    for path in sorted(set(beside) - weights):
        told = path.stat()
        digest.update(f"{path.relative_to(folder)}:{told.st_size}".encode())
        digest.update(path.read_bytes() if told.st_size <= _LARGE else str(told.st_mtime_ns).encode())
    return digest.hexdigest()


def damaged(path: str | Path, error: Exception) -> str:
    """What a user is told of a file of weights that can't be read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix(f"{path}: ")
    return f"model.name: {path}: can't be read as weights: {reason}. Fetch or copy the model again."
