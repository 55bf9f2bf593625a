"""The Ray this run lives on: the cluster it is submitted to, or one of its own."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray

from raytune_ds import clustertoken
from raytune_ds.config import ScalingConfig
from raytune_ds.errors import UserError

AUTO_CPU_WORKERS = 2
_REFUSED = (
    "The Ray cluster at {} wants its token, and has got none or another one.\n" + clustertoken.HOW_TO_GIVE_IT
)


@dataclass(frozen=True)
class Scale:
    """The workers of a run and what each of them gets."""

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int


def connect(debug: bool) -> str:
    """Joins the cluster that RAY_ADDRESS or the last `ray start` here names, or starts an embedded Ray; says which.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or the cluster wants a token that we do not have.
    """
    if ray.is_initialized():
        return "the Ray that is running"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    how = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.CRITICAL}
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS = {address}: that address is for `ray job submit`. Submit the run as a job, or unset "
            "RAY_ADDRESS to run on an embedded Ray."
        )
    if ":" in address and clustertoken.is_refused(address):
        raise UserError(_REFUSED.format(address))
    try:
        context = ray.init(include_dashboard=False, **how)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(_REFUSED.format(address or "this machine")) from error
    except ConnectionError as error:
        started_here = str(error).rpartition(" ")[2]
        if not address and clustertoken.is_refused(started_here):
            raise UserError(_REFUSED.format(started_here)) from error
        if address:
            raise UserError(
                f"RAY_ADDRESS = {address}: no Ray cluster answers there.\n"
                "Start it (ray start --head), or unset RAY_ADDRESS to run on an embedded Ray."
            ) from error
        # What `ray start` left behind of a cluster that is gone.
        context = ray.init(address="local", include_dashboard=False, **how)
    # A session is named after the process that started it.
    embedded = context.address_info["session_dir"].endswith(f"_{os.getpid()}")
    return "an embedded Ray" if embedded else f"the Ray cluster at {context.address_info['gcs_address']}"


def plan_scale(config: ScalingConfig, global_batch: int) -> Scale:
    """The workers that the cluster has room for.

    Args:
        config: num_workers auto is one a GPU, or two where there is none.
        global_batch: no rank may be without a slot.

    Raises:
        UserError: the cluster can never place them.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    use_gpu = num_gpus > 0 if config.use_gpu == "auto" else config.use_gpu
    room = sum(_room(node, use_gpu, config.cpus_per_worker) for node in nodes)
    if config.num_workers == "auto":
        wanted = min(room, global_batch) if use_gpu else min(room, global_batch, AUTO_CPU_WORKERS)
    else:
        wanted = config.num_workers
    if room < max(1, wanted):
        num_cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        each = f"{config.cpus_per_worker} CPU" + (" and a GPU" if use_gpu else "")
        raise UserError(
            f"scaling.num_workers = {config.num_workers}: the cluster has room for {room} with {each} each: "
            f"{len(nodes)} node{'s' * (len(nodes) != 1)}, {num_cpus} CPUs, {num_gpus} GPUs.\n"
            "Ask for fewer workers, lower scaling.cpus_per_worker"
            + (", set scaling.use_gpu=false" if use_gpu else "")
            + ", or add nodes."
        )
    return Scale(wanted, use_gpu, config.cpus_per_worker)


def _room(node: dict[str, float], use_gpu: bool, cpus_per_worker: int) -> int:
    by_cpu = int(node.get("CPU", 0)) // cpus_per_worker
    return min(by_cpu, int(node.get("GPU", 0))) if use_gpu else by_cpu
