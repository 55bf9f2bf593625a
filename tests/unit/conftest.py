"""What unit tests of models share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Toy sizes gain nothing from threads, and lose much where the cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each architecture, no two vectors of it the same; not to be changed."""
    from tests.unit.test_weights import distinct

    root = tmp_path_factory.mktemp("distinct")
    return {name: distinct(path, root / name) for name, path in tiny_models.items()}
