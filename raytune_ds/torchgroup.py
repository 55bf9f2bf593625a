"""How Ray Train makes torch's process group here: on the network interface that the nodes reach each other by, and once
the model is on all of them.

Ray's own backend does the same, but its module imports torch, and so would the controller, which all workers wait for.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.util
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

from raytune_ds import network
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError

SHUTDOWN_S = 30.0


@dataclass
class NodesTorchConfig(BackendConfig):
    """Of the group.

    Attributes:
        model: that the workers will load.
        revision: its commit; None for a model that is no one of the hub.
        timeout_s: after which a collective gives up.
    """

    model: ModelConfig
    revision: str | None
    timeout_s: float

    @property
    def backend_cls(self) -> type[Backend]:
        """What starts the process group."""
        return _NodesBackend

    @property
    def train_func_context(self) -> Any:
        """What a worker's function runs in: it chooses its GPU itself, so that the driver needs no torch for this."""
        return contextlib.nullcontext

    @property
    def framework(self) -> TrainingFramework:
        """As Ray's records name it."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """For Ray's records."""
        return {"timeout_s": self.timeout_s}


class _NodesBackend(Backend):  # type: ignore[misc]  # Ray's, untyped
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: NodesTorchConfig) -> None:
        """Before each start of the group, in Ray Train's controller.

        Raises:
            UserError: the user has set an interface that can't be right, or a node can't get the model.
        """
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            _on_all(worker_group, _use_interface)
        model, revision = backend_config.model, backend_config.revision
        if revision is not None:
            # Inside the group whoever has the files would wait for the others, and give up after half an hour.
            _on_all(worker_group, _fetch, model, revision)
        kind = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        meeting = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        common = (size, kind, meeting, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, _enter, rank, *common) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: NodesTorchConfig) -> None:
        """Before workers end; those that hang, or are gone, are not waited for."""
        left = worker_group.execute_async(_leave, len(worker_group) > 1)
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            ray.get(left, timeout=SHUTDOWN_S)


def _enter(rank: int, size: int, kind: str, meeting: tuple[str, int], timeout_s: float) -> None:
    """In a worker: joins the group of `size`, whose first member listens at `meeting`."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting[0], str(meeting[1])
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(kind, rank, size, init_method="env://", timeout_s=timeout_s)


def _leave(destroys: bool) -> None:
    """In a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroys)


def _on_all(worker_group: Any, action: Callable[..., str | None], *arguments: Any) -> None:
    """Does something in each worker; what it returns is what is wrong there."""
    problems = [text for text in worker_group.execute(action, *arguments) if text]
    if problems:
        raise UserError(problems[0])


def _fetch(model: ModelConfig, revision: str) -> str | None:
    """In a worker: has the files of a model of the hub on its node; workers of one node wait for the first."""
    from raytune_ds.model.weights import locate

    try:
        locate(model, revision)
    except UserError as error:
        return f"on node {platform.node()}: {error}"
    return None


def _use_interface() -> str | None:
    """In a worker: chooses the interface; what is wrong with the one that the user chose."""
    if problem := network.problem(os.environ):
        return f"on node {platform.node()}: {problem}.\nUnset it where Ray is started, and it is found by itself."
    network.use_interface_of(ray.util.get_node_ip_address(), os.environ)
    return None
