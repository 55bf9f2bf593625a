"""Versions of what has to be the same on all nodes, read without importing it."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import xxhash

import raytune_ds

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "raytune_ds")
MISSING = "not installed"


def versions() -> dict[str, str]:
    """Of Python and PACKAGES on this node; of raytune_ds also its files, which change faster than its version."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def comparable(version: str) -> str:
    """What has to agree of a version: a head without a GPU may well have the +cpu build of what its workers have."""
    return version.partition("+")[0]


def _version(name: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "no package" if name == "raytune_ds" else MISSING
    return f"{version} ({_files()})" if name == "raytune_ds" else version


@cache
def _files() -> str:
    """A few letters that tell this package's files from others."""
    root, digest = Path(raytune_ds.__file__).parent, xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:6]
