"""What the tests on real nodes and containers share; each says why where this machine is not able to run it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import containers, nodes


@pytest.fixture(scope="session")
def machines() -> None:
    """Namespaces, links and sshd may be made here."""
    if (reason := nodes.why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def images() -> Iterator[containers.Images]:
    """Both images; RAYTUNE_IMAGE_STORE names a folder to keep them in, so that the next time is short."""
    if (reason := containers.why_not()) is not None:
        pytest.skip(reason)
    kept = os.environ.get("RAYTUNE_IMAGE_STORE")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="rt-images-"))
    folder.mkdir(parents=True, exist_ok=True)
    store = containers.Images(folder)
    try:
        if containers.BASE not in store.buildah("images", "--format={{.Name}}"):
            store.make_base()
        for target in ("cpu", "cuda"):
            store.build(target)
        yield store
    finally:
        if not kept:
            shutil.rmtree(folder)
