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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray

from raytune_ds import allocator, cluster, startup
from raytune_ds.cluster import Scale
from raytune_ds.compatible import EIGHT_BIT
from raytune_ds.config import Config, ScalingConfig
from raytune_ds.startup import HOOK

# A process waits so long to become a worker, and a node so long to be asked for one.
KEPT_S, ASK_S = 120, 5.0
# Ray's own daemons run with it.
JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
# Losses of object detection want scipy, and configs of SageMaker boto3: a fifth of what a worker imports.
UNWANTED = ("scipy", "boto3")
# A group that may shrink is tried in its old size until Ray knows that a node is gone: by default a minute at a time.
# What is there is placed in milliseconds.
PLACED_S = 10
# As in ray.train.v2._internal.constants, whose package takes half a second to import: the very half a second by which
# workers would begin to import later.
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
OWN_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_BLOCKING_GET = "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"
PROPAGATED = frozenset(
    {
        "RAY_TRAIN_V2_ENABLED",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        HEALTH_CHECK_TIMEOUT,
        START_TIMEOUT,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S",
        "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S",
        "RAY_TRAIN_CHECKPOINT_UPLOAD_WARN_INTERVAL_S",
        "RAY_TRAIN_ENABLE_PRINT_PATCH",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING",
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING",
        "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION",
        "RAY_TRAIN_STATE_ACTOR_RECONCILIATION_INTERVAL_S",
        _BLOCKING_GET,
        "TORCHFT_LIGHTHOUSE",
        OWN_WATCHER,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
        "NCCL_RAS_ADDR",
    }
)
"""What Ray Train hands on of a driver's environment."""
_ours = Counter[str]()
"""How many runs of this process have set a variable."""
# Longer than any run; and what Ray waits beyond our own watch.
NEVER_S, SPARE_S = 1e9, 300.0


def runtime_env(config: Config, use_gpu: bool) -> dict[str, Any]:
    """Of the workers of a run: they import early, and compute on a CPU with jemalloc. What the job has chosen stays."""
    variables = {**_hook(config), **({} if use_gpu else _allocator())}
    return {"env_vars": variables} if variables else {}


def _hook(config: Config) -> dict[str, str]:
    """Without the package in the environment there is none: such workers find it only once Ray has told them the
    driver's path, which is after the hook.
    """
    job = _of_job()
    if HOOK in job.get("env_vars", {}) or not (_is_installed() or {"working_dir", "py_modules"} & job.keys()):
        return {}
    hook = imports_few if _in_few_bits(config) else imports
    return {HOOK: f"{__name__}.{hook.__name__}"}


def _allocator() -> dict[str, str]:
    """Where a node has no such file, the loader says so and goes on."""
    is_chosen = any(name in os.environ | _of_job().get("env_vars", {}) for name in allocator.VARIABLES)
    return {} if is_chosen else allocator.jemalloc(JEMALLOC)


def imports() -> None:
    """At the start of a worker's process: what it needs. What goes wrong here goes wrong again where it is reported."""
    _leave_out_bitsandbytes()
    with contextlib.suppress(Exception), startup.uncollected():
        with _without(UNWANTED):
            import peft  # noqa: F401

        from raytune_ds import rayworker  # noqa: F401


def imports_few() -> None:
    """The same for a run that needs bitsandbytes: that looks at GPUs, and which of them are its own Ray says later."""
    with contextlib.suppress(Exception), startup.uncollected():
        import transformers  # noqa: F401


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution("raytune_ds")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _without(modules: Iterable[str]) -> Iterator[None]:
    """What asks for these modules meanwhile is told that they are not installed."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's own mark
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _leave_out_bitsandbytes() -> None:
    """In this process: peft imports it wherever it is, and it takes as long as torch does."""
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
    """Has nodes start as many processes as will become workers, where there is room, on this node first.

    What else is needed beside workers (Ray Train's controller, a mailbox) has time until they have imported all, and
    would only take CPUs from them.
    """
    wanted = settings(config.scaling, scale)
    propagated = {name: value for name, value in (os.environ | wanted).items() if name in PROPAGATED}
    propagated.setdefault(_BLOCKING_GET, "0")  # as Ray Train has it for its controller
    own_env = runtime_env(config, scale.use_gpu).get("env_vars", {})
    own = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    missing = scale.num_workers
    for node in sorted(alive, key=lambda node: node["NodeID"] != own):
        number = min(cluster.room(node["Resources"], scale.use_gpu, scale.cpus_per_worker), missing)
        missing -= number
        if number:
            _ask(node, propagated | own_env, number)


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
    env = _of_job() | ({"env_vars": _of_job().get("env_vars", {}) | env_vars} if env_vars else {})
    # Letter by letter as Ray hands it on to the actors of actors.
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
    # Ray ends a worker that does not answer it, without a word of where it is: that comes after our own watch.
    patience = NEVER_S if scaling.hang_timeout_s is None else 2 * scaling.hang_timeout_s + SPARE_S
    wanted = {HEALTH_CHECK_TIMEOUT: str(patience), OWN_WATCHER: "0"}
    if scale.fewest is not None:
        wanted[START_TIMEOUT] = str(PLACED_S)
    return {name: value for name, value in wanted.items() if name not in os.environ or _ours[name]}


@contextlib.contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """With these variables, which the user has not set; another run of this process may have set the same."""
    os.environ.update(variables)
    _ours.update(variables.keys())
    try:
        yield
    finally:
        _ours.subtract(variables.keys())
        for name in variables:
            if not _ours[name]:
                os.environ.pop(name, None)
