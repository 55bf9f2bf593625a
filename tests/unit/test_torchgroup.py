"""The process group: what workers are asked in which order, and that who asks them needs no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from raytune_ds import torchgroup
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.torchgroup import NodesTorchConfig


class Workers:
    """A group whose workers answer at once, with what `answers` has for the name of a function."""

    def __init__(self, gpus: float, answers: dict[str, list[Any]]) -> None:
        self._gpus, self._answers = gpus, answers
        self.asked: list[str] = []
        self.entered: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return 2

    def get_resources_per_worker(self) -> dict[str, float]:
        return {"CPU": 1, "GPU": self._gpus}

    def execute(self, action: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.asked.append(action.__name__)
        return self._answers.get(action.__name__, [None, None])

    def execute_single(self, rank: int, action: Callable[..., Any]) -> Any:
        self.asked.append(action.__name__)
        return "10.0.0.1", 4711

    def execute_single_async(self, rank: int, action: Callable[..., Any], *arguments: Any) -> None:
        self.asked.append(action.__name__)
        self.entered.append(arguments)


def started(monkeypatch: pytest.MonkeyPatch, workers: Workers, revision: str | None) -> Workers:
    monkeypatch.setattr(torchgroup.ray, "get", lambda refs: refs)
    config = NodesTorchConfig(ModelConfig(name="org/model"), revision, 60)
    config.backend_cls().on_start(workers, config)
    return workers


@pytest.mark.parametrize(("gpus", "kind"), [(0, "gloo"), (1, "nccl")])
def test_all_ranks_meet_at_the_first(monkeypatch: pytest.MonkeyPatch, gpus: float, kind: str) -> None:
    workers = started(monkeypatch, Workers(gpus, {"get_node_ip_address": ["10.0.0.1"] * 2}), None)
    assert workers.entered == [(rank, 2, kind, ("10.0.0.1", 4711), 60) for rank in range(2)]
    assert "_use_interface" not in workers.asked
    assert "_fetch" not in workers.asked


def test_nodes_have_interface_and_model_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = started(monkeypatch, Workers(0, {"get_node_ip_address": ["10.0.0.1", "10.0.0.2"]}), "abc")
    assert workers.asked[1:] == ["_use_interface", "_fetch", "get_address_and_port", "_enter", "_enter"]


def test_a_node_that_can_not_get_the_model_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"get_node_ip_address": ["10.0.0.1"] * 2, "_fetch": [None, "on node b: no such commit"]}
    workers = Workers(0, answers)
    with pytest.raises(UserError, match="on node b: no such commit"):
        started(monkeypatch, workers, "abc")
    assert not workers.entered


def test_the_controller_does_without_torch() -> None:
    code = "import sys; from raytune_ds import torchgroup, mailbox; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
