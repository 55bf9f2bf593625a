"""Processes for workers: of which kind, how many, and that they stop nobody."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from ray._common.utils import load_class
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

from raytune_ds import early
from raytune_ds.cluster import Scale
from raytune_ds.config import Config
from raytune_ds.startup import Startup


def node(name: str, cpus: int, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus}}


def asked(monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], config: Config) -> list[tuple[str, str, int]]:
    """Node, hook and number of all processes that are asked for, three workers wanted, from the node `a`."""
    nodes = [node("a", 2), node("b", 8), node("c", 1, alive=False)]
    found: list[tuple[str, str, int]] = []
    monkeypatch.setattr(early, "_of_job", lambda: job)
    monkeypatch.setattr(early.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(early.ray, "get_runtime_context", lambda: Context)
    monkeypatch.setattr(
        early, "_ask", lambda node, env, number: found.append((node["NodeID"], env.get(HOOK, ""), number))
    )
    early.start(config, Scale(3, use_gpu=False, cpus_per_worker=1))
    return [each for each in found if each[2]]


class Context:
    get_node_id = staticmethod(lambda: "a")


SLIM, ALL = "raytune_ds.early.imports_without_bitsandbytes", "raytune_ds.early.imports"


def test_each_node_is_asked_for_what_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for as many that read ahead for them; the driver's own, beside that, for those that look after workers."""
    found = asked(monkeypatch, {}, Config())
    of_a = [("a", SLIM, 2), ("a", "", 2), ("a", "", early.OVERSEERS), ("a", "", 1)]
    assert found == [*of_a, ("b", SLIM, 3), ("b", "", 3)]


@pytest.mark.parametrize(
    ("settings", "hook"),
    [
        ({}, SLIM),
        ({"model": {"name": "m", "quantization": "nf4"}}, ALL),
        ({"train": {"optim": "adamw_8bit"}}, ALL),
    ],
)
def test_what_quantizes_is_imported_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], hook: str
) -> None:
    assert callable(load_class(hook))
    monkeypatch.setattr(early, "_of_job", dict)
    assert early.runtime_env(Config(**settings)) == {"env_vars": {HOOK: hook}}


def test_the_hook_of_a_job_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"env_vars": {HOOK: "theirs.hook"}}
    assert {hook for _, hook, _ in asked(monkeypatch, job, Config())} == {""}  # as the job has it
    assert early.runtime_env(Config()) == {}


def test_an_import_that_fails_is_not_told_by_the_hook() -> None:
    """Ray would say that a hook failed, and not what; and nothing of bitsandbytes is there."""
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from raytune_ds import early\n"
        "early.imports_without_bitsandbytes()\n"
        "import importlib.util; assert importlib.util.find_spec('bitsandbytes') is None\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_phase_of_a_start_ends_once() -> None:
    startup = Startup(100.0)
    startup.mark("connected", 101.234)
    startup.mark("connected", 109.0)
    assert startup.marks == {"connected": 1.23}
    assert startup.seconds(104.0) == 4.0
