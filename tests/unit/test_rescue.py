"""Workers that hang are ended whatever else does not work, and only if they still hang."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from raytune_ds import rescue as rescuing
from raytune_ds import stacks, storage
from raytune_ds.nodes import Node, Silent
from raytune_ds.rescue import rescue
from raytune_ds.rundir import RunDir
from raytune_ds.stacks import Place

A, B = Node("a", "host-a", "10.0.0.1"), Node("b", "host-b", "10.0.0.2")
PLACES = {rank: Place(node, 100 + rank, 0.0, f"/tmp/{rank}") for rank, node in enumerate("aabc")}


class Cluster:
    """Nodes a and b, whose answers are given, and c, which is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.killed: list[int] = []
        self.silent: dict[Any, set[Node]] = {}
        self.left: list[int] = []
        monkeypatch.setattr(rescuing.nodes, "alive", lambda: [A, B])
        monkeypatch.setattr(rescuing, "Delegates", lambda nodes: self)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, function: Any, deadline_s: float) -> None:
        """Waits until they are there."""

    def run_each(self, function: Any, arguments: dict[Node, Any], deadline_s: float) -> dict[Node, Any]:
        answers: dict[Node, Any] = {}
        for node, (places,) in arguments.items():
            if node in self.silent.get(function, ()):
                answers[node] = Silent("no answer after 60 s")
            elif function is stacks.of_each:
                answers[node] = {rank: f"stack of {rank}\n" for rank in places}
            else:
                self.killed += places
                answers[node] = self.left
        return answers


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def rescued(run: Path, culprits: Iterable[int]) -> tuple[dict[str, str], list[str]]:
    """Files of stacks, and what is said."""
    said: list[str] = []
    rescue(RunDir(str(run)), PLACES, lambda: list(culprits), said.append)
    files = sorted((run / "hangs").glob("*/*"))
    return {file.name: file.read_text() for file in files}, said


def test_stacks_of_all_are_kept_and_those_are_ended_that_hold_up_the_others(
    cluster: Cluster, tmp_path: Path
) -> None:
    texts, said = rescued(tmp_path, [1, 2])
    assert texts == {
        "rank-00000.txt": "stack of 0\n",
        "rank-00001.txt": "stack of 1\n",
        "rank-00002.txt": "stack of 2\n",
        "rank-00003.txt": "its node is gone\n",
    }
    assert cluster.killed == [1, 2]
    assert said[-1].startswith(f"the stacks of all workers are in {tmp_path}/hangs/")


def test_a_storage_that_hangs_with_them_does_not_save_them(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: str, content: bytes) -> None:
        assert cluster.killed == [1]
        raise OSError("Input/output error")

    monkeypatch.setattr(storage, "write_bytes", write)
    texts, said = rescued(tmp_path, [1])
    assert texts == {}
    assert said == ["the stacks of the workers can't be written: Input/output error"]


def test_those_that_got_on_meanwhile_live(cluster: Cluster, tmp_path: Path) -> None:
    _, said = rescued(tmp_path, [])
    assert cluster.killed == []
    assert "the workers get on again; none was ended" in said


def test_a_node_that_does_not_answer_is_told(cluster: Cluster, tmp_path: Path) -> None:
    cluster.silent = {stacks.of_each: {A}, stacks.kill_each: {B}}
    texts, said = rescued(tmp_path, [0, 2])
    assert texts["rank-00001.txt"] == "node host-a: no answer after 60 s\n"
    assert cluster.killed == [0]
    assert said[0] == "workers that hang can't be ended on node host-b: no answer after 60 s"


def test_workers_that_outlive_it_are_told(cluster: Cluster, tmp_path: Path) -> None:
    cluster.left = [0]
    _, said = rescued(tmp_path, [0])
    assert said[0] == "workers that hang can't be ended on node host-a: ranks [0] are still there"


def test_one_that_never_said_where_it_is_goes_with_the_others(cluster: Cluster, tmp_path: Path) -> None:
    rescued(tmp_path, [9])
    assert cluster.killed == [0, 1, 2]
