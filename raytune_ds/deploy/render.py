"""The files of a cluster, made from a config: one template a target, one `Layout` for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jinja2
import yaml

from raytune_ds.compose import differences, replaced
from raytune_ds.config import Config
from raytune_ds.deploy import kubernetes
from raytune_ds.deploy.layout import Layout, lay_out
from raytune_ds.naming import dns_label, lasting_name


@dataclass(frozen=True)
class Target:
    """Where a run goes.

    Attributes:
        template: below `templates/`.
        file: what the project's own copy of the result for the default config is called.
        shares: whether the nodes share `cluster.shared_dir`.
        lasting: whether the run is named in the file, so that another attempt resumes it.
    """

    template: str
    file: str
    shares: Callable[[Config], bool]
    lasting: bool = False


TARGETS: dict[str, Target] = {
    "aws": Target("aws.yaml.j2", "cluster/aws.yaml", lambda c: c.cluster.aws.file_system is not None),
    "gcp": Target("gcp.yaml.j2", "cluster/gcp.yaml", lambda c: c.cluster.gcp.file_share is not None),
    "onprem": Target("onprem.yaml.j2", "cluster/onprem.yaml", lambda _: True),
    "kuberay-cluster": Target(
        "kuberay-cluster.yaml.j2", "cluster/kuberay-cluster.yaml", lambda c: _claims(c)
    ),
    "kuberay-job": Target(
        "kuberay-job.yaml.j2", "cluster/kuberay-job.yaml", lambda c: _claims(c), lasting=True
    ),
    "kuberay-service": Target(
        "kuberay-service.yaml.j2", "cluster/kuberay-service.yaml", lambda c: _claims(c), lasting=True
    ),
    "compose": Target("compose.yaml.j2", "docker/compose.yaml", lambda _: True),
    "slurm": Target("slurm.sh.j2", "cluster/slurm.sh", lambda _: True),
}


def _claims(config: Config) -> bool:
    return config.cluster.kubernetes.claim is not None


def render(config: Config, target: str) -> tuple[str, Layout]:
    """The file of a target, and the nodes it describes.

    Args:
        config: of the run.
        target: a key of TARGETS.

    Raises:
        UserError: the target can never place the run.
    """
    chosen = TARGETS[target]
    layout = lay_out(config, target, chosen.shares(config))
    if target.startswith("kuberay"):
        kubernetes.require_fit(config, layout, target)
    if chosen.lasting:
        config = replaced(config, run={"name": lasting_name(config)})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raytune_ds.deploy"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["dns"] = dns_label
    text = environment.get_template(chosen.template).render(
        config=config,
        cluster=config.cluster,
        layout=layout,
        run=config.run,
        settings=settings(config, layout),
        target=target,
        ray_version=version("ray"),
    )
    return text, layout


def settings(config: Config, layout: Layout) -> str:
    """What of the config a run there needs to be told, as YAML: all that is not a default, and where its storage is."""
    tree: dict[str, Any] = {}
    for key, (_, value) in differences(Config(), config).items():
        if not key.startswith("cluster."):
            *sections, last = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
    tree.setdefault("run", {})["storage"] = layout.storage
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def describe(layout: Layout) -> str:
    """The nodes and their price, for people."""
    node = layout.node
    gpus = [f"{node.gpus} x {node.gpu}" if node.gpu else _count(node.gpus, "GPU")] if node.gpus else []
    has = ", ".join([*gpus, _count(node.cpus, "CPU"), f"{node.memory_gib} GiB"])
    each = ("a GPU and " if layout.use_gpu else "") + _count(layout.cpus_per_worker, "CPU")
    many = "as many as fit" if layout.num_workers is None else str(layout.num_workers)
    few = f"{layout.min_nodes} to " if layout.min_nodes != layout.max_nodes else ""
    lines = [
        f"nodes: {few}{layout.max_nodes}, each with {has}",
        f"workers: {many}, each with {each}; {layout.workers_per_node} on a node",
        f"run.storage: {layout.storage}",
    ]
    if layout.price is not None:
        lines.append(
            f"price: about {layout.price:,.2f} US dollars an hour with all nodes up, by the on-demand list prices of "
            "late 2025; spot nodes cost about a third of theirs"
        )
    return "\n".join(lines)


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"
