"""A head that is not there, and a token that is missing or wrong: an answer in seconds, before training."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_ds import cluster
from raytune_ds.config import ScalingConfig
from raytune_ds.errors import UserError
from tests.conftest import TOKEN
from tests.head import Head, free_port

CODE = """
from raytune_ds import cluster
from raytune_ds.command import guarded
raise SystemExit(guarded(lambda: print(cluster.connect(False)) or 0, debug=False))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty one, with a short name: socket paths below it have 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="rt") as folder:
        yield Path(folder)


def _connect(home: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of a process that joins a cluster."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=clean | {"HOME": str(home), "RAY_TMPDIR": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_right_token(token_head: Head, home: Path) -> None:
    code, said = _connect(home, RAY_ADDRESS=token_head.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert (code, "the Ray cluster at" in said) == (0, True), said


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_AUTH_MODE": "token"}, "wants a token, and there is none here"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 40}, "refuses the token"),
        ({}, "refuses the token, or misses one"),
    ],
    ids=["missing", "wrong", "mode unset"],
)
def test_a_token_that_is_missing_or_wrong(
    token_head: Head, home: Path, environment: dict[str, str], words: str
) -> None:
    """With what to do, and without a stack of Ray's."""
    code, said = _connect(home, RAY_ADDRESS=token_head.address, **environment)
    assert code == 2, said
    for part in (words, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE=token"):
        assert part in said
    assert "Traceback" not in said
    assert "b" * 40 not in said


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no-such-host.invalid:6379", "nonsense"])
def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """At once: Ray itself would go on trying for a quarter of an hour."""
    address = address.format(port=free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="no Ray cluster answers there") as caught:
        cluster.connect(False)
    assert f"RAY_ADDRESS = {address}" in str(caught.value)


def test_the_address_of_a_cluster_that_is_gone_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ray start` leaves it behind when the machine goes down; Ray itself would try to join that cluster."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _where_it_goes(monkeypatch) == "local"


def test_the_address_of_one_that_listens_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        (tmp_path / "ray").mkdir()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert _where_it_goes(monkeypatch) == "whatever Ray finds"


def _where_it_goes(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address that Ray is given."""
    asked: list[str] = []

    def init(address: str = "whatever Ray finds", **_: object) -> SimpleNamespace:
        asked.append(address)
        return SimpleNamespace(address_info={"session_dir": "", "gcs_address": ""})

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    cluster.connect(False)
    (address,) = asked
    return address


def test_gpus_are_asked_for_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2)
    with pytest.raises(UserError, match="the cluster has no GPU") as caught:
        cluster.plan_scale(ScalingConfig(use_gpu=True), 16)
    assert "scaling.use_gpu = true" in str(caught.value)
    assert "2 nodes, 8 CPUs, 0 GPUs" in str(caught.value)
