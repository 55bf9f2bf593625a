"""Worker processes that import what they need while the driver still looks at config, model and data.

A worker's imports take longer than all else until its first step, and need nothing to be known but the number of
workers. So the nodes are asked for processes of the very kind that Ray Train will ask them for; the first of them that
is idle becomes a worker. If none fits after all, or if the launch ends with an error, they are gone after a while, and
nothing else has changed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray

from raytune_ds import cluster
from raytune_ds.cluster import Scale
from raytune_ds.compatible import EIGHT_BIT
from raytune_ds.config import Config, ScalingConfig
from raytune_ds.startup import HOOK

# A process waits so long to become a worker, and a node so long to be asked for one.
KEPT_S, ASK_S = 120, 5.0
# Ray Train's controller, and what it starts beside workers: all of one environment, on the driver's node.
OVERSEERS = 4
# A group that may shrink is tried in its old size until Ray knows that a node is gone: by default a minute at a time.
# What is there is placed in milliseconds.
PLACED_S = 10
# Longer than any run; and what Ray waits beyond our own watch.
NEVER_S, SPARE_S = 1e9, 300.0


def runtime_env(config: Config) -> dict[str, Any]:
    """Of the workers of a run.

    A hook of the user's own, which a job may have, stays. Without the package in the environment there is none: such
    workers find it only once Ray has told them the driver's path, which is after the hook.
    """
    job = _of_job()
    if HOOK in job.get("env_vars", {}) or not (_is_installed() or {"working_dir", "py_modules"} & job.keys()):
        return {}
    hook = imports_few if _in_few_bits(config) else imports
    return {"env_vars": {HOOK: f"{__name__}.{hook.__name__}"}}


def imports() -> None:
    """At the start of a worker's process: what it needs. What goes wrong here goes wrong again where it is reported.

    Not bitsandbytes, which peft imports wherever it is, and which takes as long as torch does.
    """
    _leave_out_bitsandbytes()
    with contextlib.suppress(Exception):
        import peft  # noqa: F401

        from raytune_ds import rayworker  # noqa: F401


def imports_few() -> None:
    """The same for a run that needs bitsandbytes: that looks at GPUs, and which of them are its own Ray says later."""
    with contextlib.suppress(Exception):
        import transformers  # noqa: F401


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution("raytune_ds")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _leave_out_bitsandbytes() -> None:
    """In this process. What asks for it is told that it is not installed."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def _in_few_bits(config: Config) -> bool:
    return config.model.quantization != "none" or config.train.optim in EIGHT_BIT


def begin(config: Config, debug: bool) -> str | None:
    """Joins the cluster, if there is one, and has processes started there; says which cluster it is.

    For a process that is there for this one run.

    Raises:
        UserError: as cluster.join.
    """
    if not _in_few_bits(config):
        _leave_out_bitsandbytes()
    if ray.is_initialized():
        return None
    where = cluster.join(debug)
    if where is not None:
        # A head start and no more: what is wrong with the config is said in its turn, and Ray may change within.
        with contextlib.suppress(Exception):
            start(config, cluster.plan_scale(config.scaling, config.train.global_batch))
    return where


def start(config: Config, scale: Scale) -> None:
    """Has nodes start as many processes as will become workers, and this one those that look after them.

    Workers are asked for where there is room, on this node first.
    """
    from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    with in_environment(settings(config.scaling, scale)):
        propagated = get_env_vars_to_propagate()
    propagated.setdefault(
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, "0"
    )  # as Ray Train has it for its controller
    hook = runtime_env(config).get("env_vars", {})
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    missing = scale.num_workers
    for node in sorted(alive, key=lambda node: node["NodeID"] != own):
        number = min(cluster.room(node["Resources"], scale.use_gpu, scale.cpus_per_worker), missing)
        missing -= number
        if number:
            _ask(node, propagated | hook, number)
        if number and hook:
            # For the task of each worker that reads ahead.
            _ask(node, propagated | dict.fromkeys(hook, ""), number)
        if node["NodeID"] == own:
            _ask(node, propagated, OVERSEERS)
            _ask(node, {}, 1)


def _ask(node: dict[str, Any], env_vars: dict[str, str], number: int) -> None:
    """For processes with these environment variables."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=KEPT_S,
        num_workers=number,
    )
    # Letter by letter as Ray hands it on to the actors of actors.
    env = _of_job() | ({"env_vars": _of_job().get("env_vars", {}) | env_vars} if env_vars else {})
    request.runtime_env_info.serialized_runtime_env = json.dumps(
        env, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    # A node that does not answer starts its processes later, when Ray Train asks for them.
    with init_grpc_channel(address) as channel, contextlib.suppress(Exception):
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ASK_S)


def _of_job() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ray.get_runtime_context().get_runtime_env_string() or "{}")
    return found


def settings(scaling: ScalingConfig, scale: Scale) -> dict[str, str]:
    """What Ray Train reads from the environment of whoever starts a run."""
    from ray.train.v2._internal.constants import (
        WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
        WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
    )

    # Ray ends a worker that does not answer it, without a word of where it is: that comes after our own watch.
    patience = NEVER_S if scaling.hang_timeout_s is None else 2 * scaling.hang_timeout_s + SPARE_S
    wanted = {WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR: str(patience)}
    if scale.fewest is not None:
        wanted[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = str(PLACED_S)
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextlib.contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """With these variables, which were not set before."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
