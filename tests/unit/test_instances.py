"""The table of the clouds' machines: types that exist, GPU kinds that Ray knows, prices that can be right."""

from __future__ import annotations

import re

import botocore.session
import pytest
from ray.util.accelerators import accelerators

from raytune_ds.config import Config
from raytune_ds.deploy.instances import INSTANCES, Instance

MACHINES = [(cloud, name, machine) for cloud, table in INSTANCES.items() for name, machine in table.items()]
RAY_KINDS = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_")}


@pytest.mark.parametrize(("cloud", "name", "machine"), MACHINES, ids=lambda value: value)
def test_a_machine_is_plausible(cloud: str, name: str, machine: Instance) -> None:
    """A GPU kind where there are GPUs, memory by the CPUs, and a price between a CPU's and an H200's."""
    assert (machine.gpu in RAY_KINDS) if machine.gpus else machine.gpu == ""
    assert 3.5 <= machine.memory_gib / machine.cpus <= 16
    assert machine.price is not None
    each = machine.price / (machine.gpus or machine.cpus)
    assert (0.4 < each < 12) if machine.gpus else (0.02 < each < 0.1)


def test_aws_has_these_types() -> None:
    """By Amazon's own model of its API."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    assert set(INSTANCES["aws"]) <= set(ec2.shape_for("InstanceType").enum)


def test_googles_names_count_the_cpus() -> None:
    """n2-standard-4 has four; a2 and a3 count GPUs instead."""
    for name, machine in INSTANCES["gcp"].items():
        count = int(re.findall(r"-(\d+)g?$", name)[0])
        assert count == (machine.gpus if name.endswith("g") else machine.cpus), name


def test_the_defaults_are_known() -> None:
    """So that the default config has a price."""
    cluster = Config().cluster
    assert {cluster.aws.instance_type, cluster.aws.head_instance_type} <= set(INSTANCES["aws"])
    assert {cluster.gcp.machine_type, cluster.gcp.head_machine_type} <= set(INSTANCES["gcp"])
