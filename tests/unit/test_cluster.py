"""Which workers a cluster has room for, or will have."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from ray._private.ray_logging import stdout_deduplicator
from ray._private.worker import print_to_stdstream

from raytune_ds import allocator, cluster
from raytune_ds.cluster import Scale, plan_scale
from raytune_ds.compose import compose
from raytune_ds.config import ScalingConfig
from raytune_ds.deploy.render import render
from raytune_ds.errors import UserError

HEAD = {"CPU": 4.0}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scale on some nodes, where an autoscaler may make it `most` GPU nodes."""

    def plan(*nodes: dict[str, float], most: int | None = None, batch: int = 16, **scaling: Any) -> Scale:
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
        monkeypatch.delenv(cluster.MAY_GROW, raising=False)
        if most is not None:
            monkeypatch.setenv(cluster.MAY_GROW, json.dumps({"nodes": most, "CPU": 8, "GPU": 1}))
        return plan_scale(ScalingConfig(**scaling), batch)

    return plan


def test_what_is_there(scale: Any) -> None:
    assert scale(HEAD) == Scale(2, False, 1)
    assert scale(HEAD, GPU_NODE, GPU_NODE) == Scale(2, True, 1)
    assert scale(HEAD, GPU_NODE, GPU_NODE, use_gpu=False, num_workers=4, cpus_per_worker=4) == Scale(
        4, False, 4
    )
    assert scale(GPU_NODE, GPU_NODE, batch=1) == Scale(1, True, 1)
    with pytest.raises(UserError, match="room for 2"):
        scale(HEAD, GPU_NODE, GPU_NODE, num_workers=3)


def test_nodes_that_the_autoscaler_may_add_count(scale: Any) -> None:
    """A cluster that has scaled to zero is no cluster without GPUs."""
    assert scale(HEAD, most=3) == Scale(3, True, 1, nodes_to_come=3)
    assert scale(HEAD, GPU_NODE, most=3) == Scale(3, True, 1, nodes_to_come=2)
    assert scale(HEAD, GPU_NODE, most=3, num_workers=1) == Scale(1, True, 1, nodes_to_come=0)
    assert scale(HEAD, most=3, num_workers=2) == Scale(2, True, 1, nodes_to_come=2)
    with pytest.raises(UserError, match="room for 3"):
        scale(HEAD, most=3, num_workers=4)


@pytest.mark.parametrize("target", ["aws", "gcp", "kuberay-cluster", "kuberay-job"])
def test_the_files_of_a_cluster_say_what_may_come(
    target: str, scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, layout = render(compose([], ["scaling.num_workers=3"]), target)
    assert cluster.MAY_GROW in text
    told = layout.may_grow
    assert told in text or json.dumps(told) in text
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": HEAD}])
    monkeypatch.setenv(cluster.MAY_GROW, told)
    assert plan_scale(ScalingConfig(num_workers=3), 16).nodes_to_come == layout.max_nodes == 3


def test_a_queue_fixes_the_number_of_pods() -> None:
    """Nodes that can never come must not be waited for."""
    text, _ = render(compose([], ["cluster.kubernetes.queue=q", "cluster.max_nodes=4"]), "kuberay-cluster")
    assert cluster.MAY_GROW not in text


def test_a_range_needs_room_for_the_fewest(scale: Any) -> None:
    assert scale(HEAD, num_workers=(2, 9)) == Scale(9, False, 1, fewest=2)
    assert str(scale(HEAD, num_workers=(2, 9))) == "2 to 9 CPU worker(s)"
    assert scale(HEAD, num_workers=(2, 2)) == Scale(2, False, 1)
    assert scale(HEAD, GPU_NODE, most=3, num_workers=(1, 4)).room == 3
    with pytest.raises(UserError, match=r"scaling.num_workers = \[5, 9\]: the cluster has room for 4"):
        scale(HEAD, num_workers=(5, 9))


def test_of_deaths_the_run_tells_and_not_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stdout_deduplicator, "skip_re", None)
    cluster._hush_deaths()
    for line in (
        "A worker died or was killed while executing a task by an unexpected system error. ...",
        "Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:\n    [2026-11-25] ...",
        "The node with node id: d0be45 and address: 192.0.2.2 has been marked dead because the detector ...",
        "Somebody set up us the bomb",
    ):
        print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    shown = capsys.readouterr().out
    assert "set up us the bomb" in shown
    assert not [text for text in ("worker died", "Raylet is terminated", "marked dead") if text in shown]


@pytest.mark.parametrize("chosen", [None, *allocator.VARIABLES])
def test_workers_of_an_embedded_ray_keep_its_allocator_unless_another_is_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    for name in (*allocator.VARIABLES, "RAY_LD_PRELOAD_ON_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(chosen, "theirs")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the others stay as they are
    cluster._how(debug=True)
    assert os.environ.get("RAY_LD_PRELOAD_ON_WORKERS") == (None if chosen else "1")
