"""What a run asks of a cluster, held against what its nodes have: the nodes, the price, and each refusal."""

from __future__ import annotations

import pytest

from raytune_ds.compose import compose
from raytune_ds.deploy.layout import Layout, lay_out
from raytune_ds.errors import UserError

TYPE = "cluster.aws.instance_type"


def laid_out(target: str, *overrides: str, shared: bool = True) -> Layout:
    """The layout of the default config with `overrides`."""
    return lay_out(compose([], list(overrides)), target, shared)


@pytest.mark.parametrize(
    ("target", "overrides", "per_node", "nodes"),
    [
        ("aws", [], 1, 2),
        ("aws", [f"{TYPE}=g6e.48xlarge", "scaling.num_workers=16"], 8, 2),
        ("aws", [f"{TYPE}=g6e.12xlarge", "scaling.num_workers=9", "scaling.cpus_per_worker=12"], 4, 3),
        ("aws", [f"{TYPE}=g6e.12xlarge", "scaling.cpus_per_worker=16"], 3, 2),
        ("aws", ["scaling.use_gpu=false", "scaling.num_workers=9"], 8, 2),
        ("gcp", ["cluster.gcp.machine_type=g2-standard-96", "scaling.num_workers=8"], 8, 1),
        ("onprem", ["cluster.gpus_per_node=0"], 8, 2),
        ("slurm", ["cluster.gpus_per_node=4", "cluster.max_nodes=3"], 4, 3),
        ("slurm", ["scaling.num_workers=3", "cluster.max_nodes=7"], 1, 3),
    ],
)
def test_nodes_for_a_run(target: str, overrides: list[str], per_node: int, nodes: int) -> None:
    """As many workers on a node as have a GPU and their CPUs, as many nodes as they fill."""
    layout = laid_out(target, *overrides)
    assert (layout.workers_per_node, layout.num_nodes) == (per_node, nodes)


def test_what_the_config_says_of_a_machine_wins() -> None:
    """Over the table; and a type that is not in the table is taken where the config says what it has."""
    given = ["cluster.gpus_per_node=2", "cluster.cpus_per_node=16", "cluster.memory_gib_per_node=100"]
    for machine in ("g6e.48xlarge", "x9.new"):
        node = laid_out("aws", f"{TYPE}={machine}", *given).node
        assert (node.gpus, node.cpus, node.memory_gib) == (2, 16, 100)


def test_resources_name_the_gpu() -> None:
    """What Ray's autoscaler is told of a node that is not there yet."""
    assert laid_out("aws").resources == {"CPU": 8, "GPU": 1, "accelerator_type:L40S": 1}
    assert laid_out("aws", "cluster.gpus_per_node=0").resources == {"CPU": 8, "GPU": 0}
    assert laid_out("slurm").resources == {"CPU": 8, "GPU": 1}


def test_price_of_all_nodes_and_the_head() -> None:
    """None where one is not known."""
    assert laid_out("aws", "cluster.max_nodes=3").price == pytest.approx(0.2016 + 3 * 2.24208)
    assert laid_out("gcp").price == pytest.approx(0.1942 + 2 * 0.8536)
    assert laid_out("onprem").price is laid_out("slurm").price is None
    assert laid_out("aws", "cluster.aws.head_instance_type=m9.xlarge").price is None


@pytest.mark.parametrize(
    ("storage", "seen"),
    [
        ("~/raytune_ds", "/shared/raytune_ds"),
        ("/shared/runs", "/shared/runs"),
        ("gs://bucket/runs", "gs://bucket/runs"),
    ],
)
def test_storage_as_the_nodes_see_it(storage: str, seen: str) -> None:
    """The default moves onto what they share."""
    assert laid_out("gcp", f"run.storage={storage}").storage == seen


REFUSED = {
    "more CPUs than a node has": (
        ("aws", ["scaling.cpus_per_worker=9"], True),
        "scaling.cpus_per_worker = 9: a node has 8 CPUs and 1 GPUs, so no worker ever fits",
    ),
    "a GPU where there is none": (
        ("slurm", ["cluster.gpus_per_node=0", "scaling.use_gpu=true"], True),
        "a node has 8 CPUs and 0 GPUs, so no worker ever fits",
    ),
    "more workers than nodes": (
        ("aws", ["scaling.num_workers=3", "cluster.max_nodes=2"], True),
        "3 nodes are needed, and there are 2 at most. Raise cluster.max_nodes",
    ),
    "more workers than one's own nodes": (
        ("onprem", ["scaling.num_workers=3"], True),
        "3 nodes are needed, and there are 2 at most. Raise cluster.onprem.workers",
    ),
    "more nodes that stay than there may be": (
        ("aws", ["cluster.min_nodes=3"], True),
        "cluster.min_nodes = 3: there are 2 at most",
    ),
    "a machine nobody knows": (
        ("aws", [f"{TYPE}=g6e.2xlrage"], True),
        "did you mean g6e.2xlarge?); say what it has in cluster.gpus_per_node",
    ),
    "a disk of one node": (
        ("aws", ["run.storage=/data/runs"], False),
        "run.storage = /data/runs: is a directory, and the nodes of this target share none",
    ),
    "a directory beside the shared one": (
        ("gcp", ["run.storage=/data/runs"], True),
        "the nodes share /shared (cluster.shared_dir) only",
    ),
    "a bucket that the nodes may not read": (
        ("aws", ["run.storage=s3://bucket/runs"], True),
        "the GPU nodes may not read it. Name an IAM instance profile",
    ),
}


@pytest.mark.parametrize(("asked", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(asked: tuple[str, list[str], bool], words: str) -> None:
    """With the key and what to do."""
    target, overrides, shared = asked
    with pytest.raises(UserError) as refused:
        laid_out(target, *overrides, shared=shared)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_all_refusals_at_once() -> None:
    """A line each."""
    with pytest.raises(UserError) as refused:
        laid_out("aws", "scaling.cpus_per_worker=9", "cluster.min_nodes=3", "run.storage=/data")
    assert [line.split(" = ")[0] for line in str(refused.value).splitlines()] == [
        "scaling.use_gpu",
        "cluster.min_nodes",
        "run.storage",
    ]


def test_the_key_to_a_bucket_is_a_profile() -> None:
    """The refusal's own advice is taken."""
    layout = laid_out(
        "aws", "run.storage=s3://bucket/runs", "cluster.aws.instance_profile=trainer", shared=False
    )
    assert layout.storage == "s3://bucket/runs"
