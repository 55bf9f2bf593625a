"""Names of runs, and what Kubernetes makes of them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from raytune_ds.compose import differences
from raytune_ds.config import Config

DECIDES_NOTHING = (
    "cluster.",
    "scaling.",
    "engine.",
    "checkpoint.",
    "tracking.",
    "run.name",
    "run.storage",
    "run.resume",
)
"""Keys, or their sections, that a run may go on with another value of: the result is the same."""


def stem(config: Config) -> str:
    """What the run is about: its model and the first of its data."""
    sources = config.data.sources
    parts = (
        config.model.name.rstrip("/").rpartition("/")[2].replace(":", "-"),
        Path(sources[0].path.rstrip("/")).stem if sources else "demo",
    )
    return "-".join(re.sub(r"[^A-Za-z0-9._-]", "-", part) for part in parts).lstrip(".-")


def lasting_name(config: Config, but_for: tuple[str, ...] = (*DECIDES_NOTHING, "sweep.")) -> str:
    """The run's name, or one that the same settings always give, so that a second attempt resumes the first.

    Args:
        config: of the run.
        but_for: what keys begin with that decide nothing.
    """
    if config.run.name is not None:
        return config.run.name
    settings = {k: b for k, (_, b) in differences(Config(), config).items() if not k.startswith(but_for)}
    return f"{stem(config)[:100]}-{_digest(json.dumps(settings, sort_keys=True))}"


def dns_label(name: str, most: int) -> str:
    """A name as a DNS-1035 label of at most so many characters; other names give other labels."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}".rstrip("-")
    if label == name and len(label) <= most:
        return label
    return f"{label[: most - 7].rstrip('-')}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
