"""What can't work on Kubernetes, told before a file is written."""

from __future__ import annotations

from raytune_ds.config import Config
from raytune_ds.deploy.layout import Layout
from raytune_ds.errors import UserError


def require_fit(config: Config, layout: Layout, target: str) -> None:
    """Holds a pod against what goes into it.

    Args:
        config: of the run.
        layout: of its nodes; a pod is all of a node.
        target: one of KubeRay's.

    Raises:
        UserError: shared memory fills the pod, or a model is to be served without GPUs.
    """
    shm, memory = config.cluster.kubernetes.shm_gib, layout.node.memory_gib
    if shm >= memory:
        raise UserError(
            f"cluster.kubernetes.shm_gib = {shm}: shared memory is part of a pod's memory, which is {memory} GiB "
            "(cluster.memory_gib_per_node). Lower the one, or raise the other."
        )
    if target == "kuberay-service" and not layout.use_gpu:
        raise UserError(
            "--target kuberay-service: vLLM serves on GPUs, and the pods have none. Set cluster.gpus_per_node, and "
            "leave scaling.use_gpu at auto."
        )
