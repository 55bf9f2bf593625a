"""What a run asks of a cluster, held against what its nodes have, before any file is written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from raytune_ds.aliases import close
from raytune_ds.clusterconfig import ClusterConfig
from raytune_ds.config import Config, RunConfig
from raytune_ds.deploy.instances import INSTANCES, Cloud, Instance
from raytune_ds.errors import UserError

AUTO_NODES = 2
HEAD_AT_LEAST = Instance(cpus=2, memory_gib=8)
"""A head whose machine is not one of those known here."""
_MAX_NODES_KEY = {"onprem": "cluster.onprem.workers"}
ELSEWHERE = Instance(cpus=8, memory_gib=64, gpus=1)
"""A GPU node where no cloud says what it has."""


@dataclass(frozen=True)
class Layout:
    """The nodes of a run.

    Attributes:
        node: a GPU node.
        head: the head node, which trains nothing; None where the target has no machine of its own for it.
        num_workers: of the run; None: as many as there is room for.
        workers_per_node: that fit on a node.
        cpus_per_worker: that each of them has.
        use_gpu: whether each of them has a GPU.
        num_nodes: that the run fills.
        min_nodes, max_nodes: between which the cluster grows.
        storage: `run.storage` as the nodes see it.
    """

    node: Instance
    head: Instance | None
    num_workers: int | None
    workers_per_node: int
    cpus_per_worker: int
    use_gpu: bool
    num_nodes: int
    min_nodes: int
    max_nodes: int
    storage: str

    @property
    def resources(self) -> dict[str, int]:
        """What Ray is told of a GPU node before there is one."""
        kind = {f"accelerator_type:{self.node.gpu}": 1} if self.node.gpu and self.node.gpus else {}
        return {"CPU": self.node.cpus, "GPU": self.node.gpus} | kind

    @property
    def may_grow(self) -> str:
        """What a run on the head is told of the nodes that may still come, as JSON; see `cluster.MAY_GROW`."""
        return json.dumps({"nodes": self.max_nodes, "CPU": self.node.cpus, "GPU": self.node.gpus})

    @property
    def price(self) -> float | None:
        """US dollars an hour with all nodes up, on demand; None where a price is not known."""
        if self.node.price is None or self.head is None or self.head.price is None:
            return None
        return self.head.price + self.max_nodes * self.node.price


def lay_out(config: Config, target: str, shared: bool) -> Layout:
    """The nodes that a config asks a target for.

    Args:
        config: of the run, its `cluster` section included.
        target: where.
        shared: whether something is mounted at `cluster.shared_dir` there.

    Raises:
        UserError: the target can never place the run, or not all of its nodes see `run.storage`; all of it.
    """
    problems: list[str] = []
    cluster, scaling = config.cluster, config.scaling
    node, head = _machines(cluster, target, problems)
    use_gpu = node.gpus > 0 if scaling.use_gpu == "auto" else scaling.use_gpu
    by_cpu = node.cpus // scaling.cpus_per_worker
    per_node = min(by_cpu, node.gpus) if use_gpu else by_cpu
    if per_node == 0:
        problems.append(
            f"scaling.use_gpu = {use_gpu}, scaling.cpus_per_worker = {scaling.cpus_per_worker}: a node has "
            f"{node.cpus} CPUs and {node.gpus} GPUs, so no worker ever fits on one. "
            "Ask for less, or for other machines in cluster.*."
        )
        per_node = 1
    workers = scaling.bounds[1] if scaling.bounds is not None else None
    needed = AUTO_NODES if workers is None else math.ceil(workers / per_node)
    max_nodes = _most_nodes(cluster, target, needed)
    if workers is not None and needed > max_nodes:
        problems.append(
            f"scaling.num_workers = {workers}: {per_node} fit on a node, so {needed} nodes are needed, and there are "
            f"{max_nodes} at most. Raise {_MAX_NODES_KEY.get(target, 'cluster.max_nodes')}, or ask for fewer workers."
        )
    if cluster.min_nodes > max_nodes:
        problems.append(f"cluster.min_nodes = {cluster.min_nodes}: there are {max_nodes} at most.")
    storage = _storage(config, shared, problems)
    if target == "aws" and storage.startswith("s3://") and cluster.aws.instance_profile is None:
        problems.append(
            f"run.storage = {storage}: the GPU nodes may not read it. Name an IAM instance profile that may in "
            "cluster.aws.instance_profile (Ray makes one for the head alone), or use cluster.aws.file_system."
        )
    if problems:
        raise UserError("\n".join(problems))
    num_nodes = max_nodes if workers is None else needed
    return Layout(
        node,
        head,
        workers,
        per_node,
        scaling.cpus_per_worker,
        use_gpu,
        num_nodes,
        cluster.min_nodes,
        max_nodes,
        storage,
    )


def _machines(cluster: ClusterConfig, target: str, problems: list[str]) -> tuple[Instance, Instance | None]:
    """A GPU node and the head."""
    if target == "aws":
        node = _instance("aws", "cluster.aws.instance_type", cluster.aws.instance_type, cluster, problems)
        return _given(node, cluster), INSTANCES["aws"].get(cluster.aws.head_instance_type, HEAD_AT_LEAST)
    if target == "gcp":
        node = _instance("gcp", "cluster.gcp.machine_type", cluster.gcp.machine_type, cluster, problems)
        return _given(node, cluster), INSTANCES["gcp"].get(cluster.gcp.head_machine_type, HEAD_AT_LEAST)
    return _given(ELSEWHERE, cluster), None


def _instance(cloud: Cloud, key: str, name: str, cluster: ClusterConfig, problems: list[str]) -> Instance:
    if name in INSTANCES[cloud]:
        return INSTANCES[cloud][name]
    if "auto" in (cluster.gpus_per_node, cluster.cpus_per_node, cluster.memory_gib_per_node):
        near = close(name, tuple(INSTANCES[cloud]), 0.6)
        problems.append(
            f"{key} = {name}: is not one of the machines known here"
            + (f" (did you mean {near[0]}?)" if near else "")
            + "; say what it has in cluster.gpus_per_node, cpus_per_node and memory_gib_per_node."
        )
    return ELSEWHERE


def _given(instance: Instance, cluster: ClusterConfig) -> Instance:
    """The machine with what the config says of it."""
    gpus, cpus, memory = cluster.gpus_per_node, cluster.cpus_per_node, cluster.memory_gib_per_node
    return Instance(
        cpus=instance.cpus if cpus == "auto" else cpus,
        memory_gib=instance.memory_gib if memory == "auto" else memory,
        gpus=instance.gpus if gpus == "auto" else gpus,
        gpu=instance.gpu,
        price=instance.price,
    )


def _most_nodes(cluster: ClusterConfig, target: str, needed: int) -> int:
    if target == "onprem":
        return len(cluster.onprem.workers)
    return needed if cluster.max_nodes == "auto" else cluster.max_nodes


def _storage(config: Config, shared: bool, problems: list[str]) -> str:
    """`run.storage` where all nodes see it; the default one moves onto what they share."""
    storage, shared_dir = config.run.storage, config.cluster.shared_dir
    if "://" in storage:
        return storage
    if shared and storage == RunConfig().storage:
        return f"{shared_dir}/raytune_ds"
    if not shared:
        problems.append(
            f"run.storage = {storage}: is a directory, and the nodes of this target share none. Set run.storage to a "
            "bucket (s3://, gs://), or name a shared file system in the target's section of cluster.*."
        )
    elif not storage.startswith(f"{shared_dir}/"):
        problems.append(
            f"run.storage = {storage}: the nodes share {shared_dir} (cluster.shared_dir) only; choose a place "
            "below it, or a bucket (s3://, gs://)."
        )
    return storage
