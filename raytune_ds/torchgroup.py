"""How Ray Train makes torch's process group here: on the network interface that the nodes reach each other by."""

from __future__ import annotations

import os
import platform
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from raytune_ds import network
from raytune_ds.errors import UserError


class NodesTorchConfig(TorchConfig):
    """Ray's, with the interface for gloo and NCCL set in each worker where the user has not set one."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the process group."""
        return _NodesBackend


class _NodesBackend(_TorchBackend):  # type: ignore[misc]  # Ray's, untyped
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Before each start of the group, in Ray Train's controller.

        Raises:
            UserError: the user has set an interface that can't be right.
        """
        several_nodes = len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1
        problems = [text for text in worker_group.execute(_use_interface) if text] if several_nodes else []
        if problems:
            raise UserError(problems[0])
        super().on_start(worker_group, backend_config)


def _use_interface() -> str | None:
    """In a worker: chooses the interface; what is wrong with the one that the user chose."""
    if problem := network.problem(os.environ):
        return f"on node {platform.node()}: {problem}.\nUnset it where Ray is started, and it is found by itself."
    network.use_interface_of(ray.util.get_node_ip_address(), os.environ)
    return None
