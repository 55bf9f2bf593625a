"""How Ray Train makes torch's process group here: on the network interface that the nodes reach each other by, and once
the model is on all of them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from raytune_ds import network
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model.weights import locate


@dataclass
class NodesTorchConfig(TorchConfig):
    """Ray's, with the interface for gloo and NCCL set in each worker where the user has not set one.

    Attributes:
        model: that the workers will load.
        revision: its commit; None for a model that is no one of the hub.
    """

    model: ModelConfig | None = None
    revision: str | None = None

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the process group."""
        return _NodesBackend


class _NodesBackend(_TorchBackend):  # type: ignore[misc]  # Ray's, untyped
    def on_start(self, worker_group: Any, backend_config: NodesTorchConfig) -> None:
        """Before each start of the group, in Ray Train's controller.

        Raises:
            UserError: the user has set an interface that can't be right, or a node can't get the model.
        """
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            _on_all(worker_group, _use_interface)
        model, revision = backend_config.model, backend_config.revision
        if model is not None and revision is not None:
            # Inside the group whoever has the files would wait for the others, and give up after half an hour.
            _on_all(worker_group, _fetch, model, revision)
        super().on_start(worker_group, backend_config)


def _on_all(worker_group: Any, action: Callable[..., str | None], *arguments: Any) -> None:
    """Does something in each worker; what it returns is what is wrong there."""
    problems = [text for text in worker_group.execute(action, *arguments) if text]
    if problems:
        raise UserError(problems[0])


def _fetch(model: ModelConfig, revision: str) -> str | None:
    """In a worker: has the files of a model of the hub on its node; workers of one node wait for the first."""
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
