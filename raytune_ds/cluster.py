"""The Ray this run lives on: the cluster it is submitted to, or one of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.ray_logging import stdout_deduplicator
from ray._private.utils import read_ray_address

from raytune_ds import allocator
from raytune_ds.config import ScalingConfig
from raytune_ds.errors import UserError

AUTO_CPU_WORKERS = 2
MAY_GROW = "RAYTUNE_DS_MAY_GROW"
"""Environment variable of the head, where jobs run: the nodes that may still come, as `Layout.may_grow` writes them."""
CONNECT_S = 5.0
TRIES = 5  # of Ray, a second each, once somebody listens there
_DEATHS = re.compile(
    r"^(A worker died or was killed|Raylet is terminated|The node with node id: .* marked dead)"
)
_TOKEN = (
    "{what}.\nPut the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on the head "
    "shows it) and set RAY_AUTH_MODE=token. A job that `ray job submit` starts has it by "
    "itself. Or set RAY_ADDRESS=local to run on an embedded Ray."
)


@dataclass(frozen=True)
class Scale:
    """The workers of a run and what each of them gets.

    Attributes:
        num_workers: the most there can be.
        nodes_to_come: that the autoscaler has to add for them.
        fewest: that the run goes on with when nodes go; None if their number does not change.
        room: workers of this kind that the cluster has room for, or will have once it has grown.
    """

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    nodes_to_come: int = 0
    fewest: int | None = None
    room: int = field(default=0, compare=False)

    def __str__(self) -> str:
        number = str(self.num_workers) if self.fewest is None else f"{self.fewest} to {self.num_workers}"
        return f"{number} {'GPU' if self.use_gpu else 'CPU'} worker(s)"


def connect(debug: bool, dashboard: bool = False) -> str:
    """Joins the cluster that RAY_ADDRESS or the last `ray start` here names, or starts an embedded Ray; says which.

    Args:
        debug: show what Ray says, too.
        dashboard: an embedded Ray has its dashboard.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or the cluster refuses this user's token.
    """
    if ray.is_initialized():
        return "the Ray that is running"
    return join(debug) or _named(ray.init("local", **_how(debug, dashboard)))


def join(debug: bool) -> str | None:
    """Joins the cluster that RAY_ADDRESS or the last `ray start` here names, and says which; None if there is none.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or the cluster refuses this user's token.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if "://" in given:
        raise UserError(
            f"RAY_ADDRESS = {given}: that address is for `ray job submit`. Submit the run as a job, or unset "
            "RAY_ADDRESS to run on an embedded Ray."
        )
    return _named(_join(given, _how(debug))) if _expects_cluster(given) else None


def _how(debug: bool, dashboard: bool = False) -> dict[str, Any]:
    """To start Ray, or to join it."""
    if not debug:
        _hush_deaths()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Trials of a sweep bring actors that need no CPU, and Ray warns of more processes than CPUs.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # A Ray that starts here has jemalloc for its daemons; workers with it prepare data with a twentieth less time.
    if not any(name in os.environ for name in allocator.VARIABLES):
        os.environ.setdefault("RAY_LD_PRELOAD_ON_WORKERS", "1")
    return {
        "include_dashboard": dashboard,
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.CRITICAL,
    }


def _named(context: Any) -> str:
    # A session is named after the process that started it.
    embedded = context.address_info["session_dir"].endswith(f"_{os.getpid()}")
    return "an embedded Ray" if embedded else f"the Ray cluster at {context.address_info['gcs_address']}"


def _hush_deaths() -> None:
    """Ray prints each death with pages of a log, whatever log_to_driver says; a run tells of it in a line."""
    stdout_deduplicator.skip_re = stdout_deduplicator.skip_re or _DEATHS


def _expects_cluster(given: str) -> bool:
    """Whether there is a cluster to join; what `ray start` left behind of one that is gone does not count.

    Raises:
        UserError: nobody listens at the address that the user named. Ray itself would try for a quarter of an hour.
    """
    if given in ("", "local"):
        found = "" if given else read_ray_address()
        return bool(found) and _listens(str(found))
    if given != "auto" and not _listens(given):
        raise _no_cluster(given)
    return True


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _join(given: str, how: dict[str, Any]) -> Any:
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(TRIES))
    try:
        return ray.init(**how)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            _TOKEN.format(what="the Ray cluster wants a token, and there is none here")
        ) from error
    except ConnectionError as error:
        if "Authentication" in str(error.__cause__):
            where = f"RAY_ADDRESS = {given}: " if given else ""
            raise UserError(
                _TOKEN.format(what=f"{where}the Ray cluster refuses the token, or misses one")
            ) from error
        if not given:
            return ray.init("local", **how)
        raise _no_cluster(given) from error


def _no_cluster(given: str) -> UserError:
    return UserError(
        f"RAY_ADDRESS = {given}: no Ray cluster answers there.\n"
        "Start it (ray start --head), or unset RAY_ADDRESS to run on an embedded Ray."
    )


def plan_scale(config: ScalingConfig, global_batch: int) -> Scale:
    """The workers that the cluster has room for, or will have once it has grown.

    Args:
        config: num_workers auto is one a GPU, or two where there is none.
        global_batch: no rank may be without a slot.

    Raises:
        UserError: the cluster can never place them.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = alive + _to_come(alive)
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    num_cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    use_gpu = num_gpus > 0 if config.use_gpu == "auto" else config.use_gpu
    there = f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {num_cpus} CPUs, {num_gpus} GPUs"
    if use_gpu and num_gpus == 0:
        raise UserError(
            f"scaling.use_gpu = true: the cluster has no GPU ({there}).\n"
            "Add nodes that have, or set scaling.use_gpu=auto to train on CPUs where there is no GPU."
        )
    there_is = sum(room(node, use_gpu, config.cpus_per_worker) for node in nodes)
    if config.bounds is not None:
        fewest, wanted = config.bounds
    else:
        fewest = wanted = min(there_is, global_batch, *([] if use_gpu else [AUTO_CPU_WORKERS]))
    if there_is < max(1, fewest):
        each = f"{config.cpus_per_worker} CPU" + (" and a GPU" if use_gpu else "")
        raise UserError(
            f"scaling.num_workers = {_shown(config.num_workers)}: the cluster has room for {there_is} with {each} "
            f"each: {there}.\n"
            "Ask for fewer workers, lower scaling.cpus_per_worker"
            + (", set scaling.use_gpu=false" if use_gpu else "")
            + ", or add nodes."
        )
    room_now = sum(room(node, use_gpu, config.cpus_per_worker) for node in alive)
    waited_for = 0
    for node in nodes[len(alive) :]:
        if room_now < wanted:
            room_now += room(node, use_gpu, config.cpus_per_worker)
            waited_for += 1
    elastic = fewest if fewest < wanted else None
    return Scale(wanted, use_gpu, config.cpus_per_worker, waited_for, elastic, there_is)


def _shown(num_workers: object) -> object:
    return list(num_workers) if isinstance(num_workers, tuple) else num_workers


def _to_come(alive: list[dict[str, float]]) -> list[dict[str, float]]:
    """The nodes that the autoscaler may still add. Ray itself does not tell what those are."""
    if not (text := os.environ.get(MAY_GROW)):
        return []
    kind = json.loads(text)
    most = int(kind.pop("nodes"))
    there = sum(all(node.get(name, 0) >= amount for name, amount in kind.items()) for node in alive)
    return [kind] * max(0, most - there)


def room(node: dict[str, float], use_gpu: bool, cpus_per_worker: int) -> int:
    """The workers of a kind that a node with these resources has room for."""
    by_cpu = int(node.get("CPU", 0)) // cpus_per_worker
    return min(by_cpu, int(node.get("GPU", 0))) if use_gpu else by_cpu
