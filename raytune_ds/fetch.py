"""The files of a model of the hub, on every node before the workers start.

A download inside the process group could outlast its patience: who has the files already would wait for the others, and
give up after half an hour.
"""

from __future__ import annotations

import ray

from raytune_ds.config import ModelConfig
from raytune_ds.console import say
from raytune_ds.errors import UserError
from raytune_ds.model.weights import locate
from raytune_ds.nodes import Delegates, Silent, alive


def fetch(model: ModelConfig, revision: str | None, use_gpu: bool) -> None:
    """Downloads a model on each node that may get a worker; what is there already is not downloaded again.

    Args:
        model: names it.
        revision: its commit; None for a model that is no one of the hub.
        use_gpu: whether workers go to nodes with a GPU only.

    Raises:
        UserError: a node can't get it.
    """
    if revision is None:
        return
    resource = "GPU" if use_gpu else "CPU"
    with_room = {node["NodeID"] for node in ray.nodes() if node["Resources"].get(resource, 0) >= 1}
    nodes = [node for node in alive() if node.id in with_room]
    say(f"model: fetching {model.name} on {len(nodes)} node(s), where it is not there yet")
    with Delegates(nodes) as delegates:
        answers = delegates.run(locate, model, revision)
    failed = [f"  {n.name}: {answer.reason}" for n, answer in answers.items() if isinstance(answer, Silent)]
    if failed:
        raise UserError(f"model.name = {model.name}: not all nodes can get it:\n" + "\n".join(failed))
