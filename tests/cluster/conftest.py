"""Tests that need a machine on which namespaces, links and sshd may be made; they are run by `make test-cluster`."""

from __future__ import annotations

import pytest

from tests.cluster.nodes import why_not


@pytest.fixture(scope="session", autouse=True)
def _able() -> None:
    if reason := why_not():
        pytest.skip(reason)
