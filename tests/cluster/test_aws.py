"""The shipped AWS file of `ray up`: moto plays EC2 and IAM, and the machines it invents are there to answer SSH."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.nodes import Machine, World, new_world, wait_until
from tests.cluster.rayup import ray_up, rendered

pytest.importorskip("moto")
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("machines"), pytest.mark.timeout(600)]

NET = "10.99.1"
DESK, HEAD, NODES = f"{NET}.2", f"{NET}.4", (f"{NET}.5", f"{NET}.6")  # EC2 hands addresses out from .4 on
ENDPOINT = f"http://{DESK}:5000"
ENVIRONMENT = {
    "AWS_ENDPOINT_URL": ENDPOINT,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# A subnet whose first addresses are those of the machines, their key, and an image.
_SEED = """
import json, pathlib, sys, boto3
ec2 = boto3.client("ec2", "us-east-1")
vpc = ec2.create_vpc(CidrBlock=sys.argv[1])["Vpc"]["VpcId"]
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock=sys.argv[1])["Subnet"]["SubnetId"]
ec2.import_key_pair(KeyName="tests", PublicKeyMaterial=pathlib.Path(sys.argv[2]).read_bytes())
print(json.dumps({"subnet": subnet, "image": ec2.describe_images()["Images"][0]["ImageId"]}))
"""
_INSTANCES = """
import json, boto3
pages = boto3.client("ec2", "us-east-1").describe_instances()["Reservations"]
print(json.dumps([
    [i["InstanceType"], i.get("InstanceLifecycle", "on demand"), i["State"]["Name"]]
    for page in pages for i in page["Instances"]
]))
"""
_ASK = """
import ray
from ray.autoscaler.sdk import request_resources
ray.init("auto", logging_level="ERROR")
request_resources(bundles=[{"GPU": 1}, {"GPU": 1}])
"""


@pytest.fixture
def world(machines: None) -> Iterator[World]:
    """A desk, on which EC2 is too, and the machines that it gives out."""
    with new_world(ENVIRONMENT) as world:
        for name, address in zip(("desk", "head", "n1", "n2"), (DESK, HEAD, *NODES), strict=True):
            world.add(name, address)
        yield world


def _python(machine: Machine, script: str, *arguments: str) -> str:
    return machine.run("python", "-c", script, *arguments, RAY_AUTH_MODE="token").stdout.strip()


def _instances(desk: Machine) -> Counter[tuple[str, str, str]]:
    return Counter(map(tuple, json.loads(_python(desk, _INSTANCES))))


def test_machines_come_when_they_are_asked_for_and_go(world: World) -> None:
    """From a head alone to two GPU nodes: spot where EC2 has it (moto gives one at a time), the rest on demand."""
    desk, head, *nodes = world.machines
    serve = "from moto.server import main; main(['--host', '0.0.0.0', '--port', '5000'])"
    moto_log = world.folder / "moto.log"
    desk.start("python", "-c", serve, log=moto_log, MOTO_IAM_LOAD_MANAGED_POLICIES="true")
    listens = ["bash", "-c", f"</dev/tcp/{DESK}/5000"]
    wait_until("moto answers", lambda: desk.run(*listens, check=False).returncode == 0, 60)
    seeded = json.loads(_python(desk, _SEED, f"{NET}.0/24", f"{world.key}.pub"))

    text = rendered("aws", f"cluster.aws.machine_image={seeded['image']}")
    file = world.folder / "aws.yaml"
    file.write_text(yaml.safe_dump(_for_moto(yaml.safe_load(text), seeded["subnet"], str(world.key))))
    with ray_up(desk, head, file) as cluster:
        assert _instances(desk) == {("m7i.xlarge", "on demand", "running"): 1}
        _python(head, _ASK)
        took = cluster.wait_for_nodes(3)
        print(f"ray up {cluster.up_s:.0f} s; two GPU nodes {took:.0f} s after they were asked for")
        assert sorted(node["Resources"].get("GPU", 0) for node in cluster.nodes()) == [0, 1, 1]
        assert all(len(node.processes("raylet")) == 1 for node in nodes)
        assert _instances(desk) == {
            ("m7i.xlarge", "on demand", "running"): 1,
            ("g6e.2xlarge", "spot", "running"): 1,
            ("g6e.2xlarge", "on demand", "running"): 1,
        }
    assert {state for _, _, state in _instances(desk)} == {"terminated"}


def _for_moto(config: dict, subnet: str, key: str) -> dict:  # type: ignore[type-arg]
    """The file without Docker, and with addresses and the key of machines that are there already."""
    del config["docker"]
    config["initialization_commands"] = []  # what mounts EFS
    config["provider"]["use_internal_ips"] = True
    config["auth"] = {"ssh_user": "root", "ssh_private_key": key}
    for kind in config["available_node_types"].values():
        kind["node_config"] |= {"KeyName": "tests", "SubnetIds": [subnet]}
    return config
