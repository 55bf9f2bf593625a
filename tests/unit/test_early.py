"""Processes for workers: of which kind, how many, and that they stop nobody."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from ray._common.utils import load_class
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from raytune_ds import allocator, early
from raytune_ds.cluster import Scale
from raytune_ds.config import Config
from raytune_ds.startup import HOOK, Startup, uncollected


def node(name: str, cpus: int, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus}}


def asked(monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], config: Config) -> list[tuple[str, str, int]]:
    """Node, hook and number of all processes that are asked for, three workers wanted, from the node `a`."""
    nodes = [node("d", 8, alive=False), node("b", 8), node("c", 8), node("a", 2)]
    found: list[tuple[str, str, int]] = []
    monkeypatch.setattr(early, "_of_job", lambda: job)
    monkeypatch.setattr(early.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(early.ray, "get_runtime_context", lambda: Context)
    monkeypatch.setattr(
        early, "_ask", lambda node, env, number: found.append((node["NodeID"], env.get(HOOK, ""), number))
    )
    early.start(config, Scale(3, use_gpu=False, cpus_per_worker=1))
    return found


class Context:
    get_node_id = staticmethod(lambda: "a")


ALL, FEW = "raytune_ds.early.imports", "raytune_ds.early.imports_few"


def test_so_many_processes_are_asked_for_as_there_will_be_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the driver's own node first, and of none that is dead."""
    assert asked(monkeypatch, {}, Config()) == [("a", ALL, 2), ("b", ALL, 1)]


def test_what_ray_train_hands_on_is_known() -> None:
    """Without its package, which takes long to import. A process with another environment would become no worker."""
    from ray.train.v2._internal import constants

    assert early.PROPAGATED == constants.ENV_VARS_TO_PROPAGATE
    assert early.HEALTH_CHECK_TIMEOUT == constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
    assert early.START_TIMEOUT == constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    assert early.OWN_WATCHER == constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR


def test_the_hook_is_the_one_that_ray_runs() -> None:
    assert HOOK == WORKER_PROCESS_SETUP_HOOK_ENV_VAR


def test_without_the_package_in_the_environment_there_is_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be looked for before Ray has said where the driver found it."""
    monkeypatch.setattr(early, "_is_installed", lambda: False)
    monkeypatch.setattr(early, "_of_job", dict)
    assert early.runtime_env(Config(), use_gpu=True) == {}
    monkeypatch.setattr(early, "_of_job", lambda: {"working_dir": "gcs://it.zip"})
    assert early.runtime_env(Config(), use_gpu=True) == {"env_vars": {HOOK: ALL}}


@pytest.mark.parametrize(
    ("settings", "hook"),
    [
        ({}, ALL),
        ({"model": {"name": "m", "quantization": "nf4"}}, FEW),
        ({"train": {"optim": "adamw_8bit"}}, FEW),
    ],
)
def test_what_quantizes_is_imported_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], hook: str
) -> None:
    assert callable(load_class(hook))
    monkeypatch.setattr(early, "_of_job", dict)
    assert early.runtime_env(Config(**settings), use_gpu=True) == {"env_vars": {HOOK: hook}}


def test_the_hook_of_a_job_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"env_vars": {HOOK: "theirs.hook"}}
    assert {hook for _, hook, _ in asked(monkeypatch, job, Config())} == {""}  # as the job has it
    assert early.runtime_env(Config(), use_gpu=True) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="Ray brings it for Linux")
def test_workers_on_cpus_begin_with_jemalloc_unless_another_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(early, "_of_job", dict)
    assert early.runtime_env(Config(), use_gpu=False)["env_vars"]["LD_PRELOAD"] == str(early.JEMALLOC)
    assert "LD_PRELOAD" not in early.runtime_env(Config(), use_gpu=True)["env_vars"]
    monkeypatch.setattr(early, "_of_job", lambda: {"env_vars": {"LD_PRELOAD": "libtcmalloc.so"}})
    assert early.runtime_env(Config(), use_gpu=False) == {"env_vars": {HOOK: ALL}}
    monkeypatch.setattr(early, "_of_job", dict)
    monkeypatch.setenv("MALLOC_CONF", "thp:always")
    assert early.runtime_env(Config(), use_gpu=False) == {"env_vars": {HOOK: ALL}}


def test_an_import_that_fails_is_not_told_by_the_hook() -> None:
    """Ray would say that a hook failed, and not what; and nothing of bitsandbytes is there."""
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from raytune_ds import early\n"
        "early.imports()\n"
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


def test_all_that_a_worker_needs_is_imported() -> None:
    """Whatever is hidden meanwhile: an import that fails there is told nowhere."""
    code = (
        "from raytune_ds import early; early.imports()\n"
        "import sys; assert {'peft', 'raytune_ds.rayworker'} <= set(sys.modules)\n"
        "import gc; assert gc.isenabled() and gc.get_freeze_count() > 500_000"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def collector() -> Iterator[None]:
    """Has frozen nothing; afterwards it is as it was, or has frozen more."""
    is_on, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.unfreeze()
    yield
    if not frozen:
        gc.unfreeze()
    gc.enable() if is_on else gc.disable()


@pytest.mark.parametrize("is_on", [True, False])
def test_imports_are_not_searched_for_garbage(collector: None, is_on: bool) -> None:
    gc.enable() if is_on else gc.disable()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() is is_on
    assert gc.get_freeze_count() > 1_000


def test_what_is_hidden_for_a_while_is_there_afterwards() -> None:
    code = (
        "import importlib.util, sys\n"
        "from raytune_ds import early\n"
        "with early._without(early.UNWANTED):\n"
        "    assert not any(map(importlib.util.find_spec, early.UNWANTED))\n"
        "assert not set(early.UNWANTED) & set(sys.modules)\n"
        "import scipy.stats\n"
        "with early._without(early.UNWANTED):\n"
        "    assert sys.modules['scipy'] is scipy"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
