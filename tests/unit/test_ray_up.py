"""The files for `ray up`: by Ray's own checks, by the clouds' models of their APIs, and spot with a way out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from threading import RLock
from types import SimpleNamespace
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.exceptions import ClientError
from botocore.model import Shape
from botocore.validate import ParamValidator
from googleapiclient.discovery_cache import get_static_doc
from ray.autoscaler._private.gcp.config import GCPNodeType
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

from raytune_ds.compose import compose
from raytune_ds.deploy.render import render

VARIANTS = {
    "default": [],
    "on demand, no file system": [
        "cluster.spot=false",
        "cluster.min_nodes=1",
        "cluster.aws.file_system=null",
        "cluster.gcp.file_share=null",
        "cluster.aws.instance_profile=trainer",
        "cluster.onprem.docker=false",
        "run.storage=s3://bucket/runs",
    ],
    "eight GPUs a node": [
        "cluster.aws.instance_type=p5.48xlarge",
        "cluster.gcp.machine_type=a3-highgpu-8g",
        "cluster.gpus_per_node=8",
        "scaling.num_workers=16",
    ],
    "no GPUs, no environment": ["cluster.gpus_per_node=0", "cluster.cpus_per_node=4", "cluster.pass_env=[]"],
}


def rendered(target: str, overrides: list[str]) -> dict[str, Any]:
    """The file as Ray reads it."""
    return yaml.safe_load(render(compose([], overrides), target)[0])


def node_configs(target: str, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """What the provider is told of each kind of node."""
    for kind in rendered(target, overrides)["available_node_types"].values():
        yield kind["node_config"]


def every_variant(*targets: str) -> pytest.MarkDecorator:
    """Each target with each of VARIANTS."""
    cases = [pytest.param(t, o, id=f"{t}, {name}") for t in targets for name, o in VARIANTS.items()]
    return pytest.mark.parametrize(("target", "overrides"), cases)


# ------------------------------------------------------------------------------------------------- Ray's own checks


@every_variant("aws", "gcp", "onprem")
def test_ray_takes_it(target: str, overrides: list[str]) -> None:
    """Filled with Ray's defaults, by Ray's schema; nothing is left to defaults that install something."""
    config = prepare_config(rendered(target, overrides))
    validate_config(config)
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert config["file_mounts"] == {"~/.ray": "~/.ray"}


@every_variant("aws", "gcp", "onprem")
def test_its_commands_are_shell(target: str, overrides: list[str]) -> None:
    """And each `ray start` has the token's mode, and the metrics' port; the head starts the autoscaler."""
    config = rendered(target, overrides)
    starts = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for command in [*config["initialization_commands"], *starts[0], *starts[1]]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for _, start in starts:
        assert start.index("export RAY_AUTH_MODE=token; ") < start.index("; ray start ")
        assert " --metrics-export-port=8080" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0][1]


@pytest.mark.parametrize(
    ("target", "spoil"),
    [
        ("aws", lambda config: config.update(idle_timeout=5)),
        ("gcp", lambda config: config["docker"].update(shm_size="8g")),
        ("aws", lambda config: config["available_node_types"]["gpu"].update(min_nodes=1)),
        ("aws", lambda config: config["available_node_types"]["gpu"]["resources"].update(GPU="one")),
        ("onprem", lambda config: config["auth"].update(ssh_key="id")),
        ("gcp", lambda config: config.update(head_node_type="chief")),
    ],
)
def test_ray_finds_a_planted_mistake(target: str, spoil: Any) -> None:
    """The check can fail."""
    config = prepare_config(rendered(target, []))
    spoil(config)
    with pytest.raises(Exception, match=r"idle_timeout|shm_size|min_nodes|'one'|ssh_key|head_node_type"):
        validate_config(config)


def test_autoscaling_from_zero_and_to_the_layout() -> None:
    """No node at first, as many as the run fills at most, and Ray knows their GPUs before there is one."""
    kinds = rendered("aws", ["scaling.num_workers=5"])["available_node_types"]
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 5)
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["head"]["resources"] == {"CPU": 4, "GPU": 0}
    onprem = rendered("onprem", ["cluster.onprem.workers=[a,b,c]"])
    assert (onprem["min_workers"], onprem["max_workers"]) == (3, 3)


def test_onprem_without_docker_mentions_none() -> None:
    """Nor does it start anything in it."""
    text = render(compose([], ["cluster.onprem.docker=false"]), "onprem")[0]
    assert "docker" not in text.lower()
    assert "docker" in render(compose([], []), "onprem")[0]


def test_gpus_only_where_there_are_some() -> None:
    """`docker run --gpus all` fails on a machine without one."""
    assert "--gpus all" in rendered("aws", [])["docker"]["worker_run_options"]
    assert "--gpus all" not in rendered("aws", ["cluster.gpus_per_node=0"])["docker"]["worker_run_options"]
    assert "--gpus all" not in rendered("aws", [])["docker"]["head_run_options"]


# ----------------------------------------------------------------------------------------- the clouds' own models


EC2 = botocore.session.get_session().get_service_model("ec2")
RUN_INSTANCES = EC2.operation_model("RunInstances").input_shape


def aws_problems(node_config: dict[str, Any]) -> list[str]:
    """What EC2's RunInstances does not know, in names, types and choices."""
    call = {**node_config, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(call, RUN_INSTANCES).generate_report()
    return report.splitlines() or list(_no_choices(call, RUN_INSTANCES, ""))


def _no_choices(value: Any, shape: Shape, at: str) -> Iterator[str]:
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from _no_choices(part, shape.members[name], f"{at}.{name}")
    elif shape.type_name == "list":
        for part in value:
            yield from _no_choices(part, shape.member, f"{at}[]")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{at} = {value}"


def gcp_problems(node_config: dict[str, Any]) -> list[str]:
    """What the Instance of compute.v1 does not know, in names, types and choices."""
    return list(_off_schema(node_config, SCHEMAS["Instance"], ""))


SCHEMAS = json.loads(get_static_doc("compute", "v1"))["schemas"]
_JSON_TYPES = {"string": str, "boolean": bool, "integer": int, "object": dict, "array": list}


def _off_schema(value: Any, schema: dict[str, Any], at: str) -> Iterator[str]:
    schema = SCHEMAS[schema["$ref"]] if "$ref" in schema else schema
    if schema.get("format") in ("int64", "uint64"):
        expected: type = int  # a string in JSON, and Google takes both
    else:
        expected = _JSON_TYPES[schema["type"]]
    if not isinstance(value, expected):
        yield f"{at} = {value!r} is no {schema['type']}"
    elif isinstance(value, dict):
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if inner is None:
                yield f"{at}.{name} is unknown"
            else:
                yield from _off_schema(part, inner, f"{at}.{name}")
    elif isinstance(value, list):
        for part in value:
            yield from _off_schema(part, schema["items"], f"{at}[]")
    elif value not in schema.get("enum", [value]):
        yield f"{at} = {value}"


@every_variant("aws")
def test_aws_knows_every_field(target: str, overrides: list[str]) -> None:
    """Of the head and of the GPU nodes."""
    assert [aws_problems(node) for node in node_configs(target, overrides)] == [[], []]


@every_variant("gcp")
def test_google_knows_every_field(target: str, overrides: list[str]) -> None:
    """Of the head and of the GPU nodes."""
    assert [gcp_problems(node) for node in node_configs(target, overrides)] == [[], []]


@pytest.mark.parametrize(
    "mistake",
    [
        {"instanceType": "g6e.2xlarge"},
        {"InstanceType": "g6e.2xlrage"},
        {"ImageId": 7},
        {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "200"}}]},
        {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeTyp": "gp3"}}]},
        {"BlockDeviceMappings": {"DeviceName": "/dev/sda1"}},
        {"InstanceMarketOptions": {"MarketType": "sport"}},
        {"IamInstanceProfile": "trainer"},
        {"MetadataOptions": {"HttpTokens": "yes"}},
    ],
    ids=str,
)
def test_aws_mistakes_are_found(mistake: dict[str, Any]) -> None:
    """The check can fail."""
    _, gpu = node_configs("aws", [])
    assert len(aws_problems(gpu | mistake)) == 1


@pytest.mark.parametrize(
    "mistake",
    [
        {"machine_type": "g2-standard-8"},
        {"machineType": 8},
        {"disks": [{"boot": True, "initializeParams": {"diskSizeGB": 200}}]},
        {"disks": [{"boot": "yes"}]},
        {"disks": {"boot": True}},
        {"disks": [{"type": "PERMANENT"}]},
        {"scheduling": {"provisioningModel": "SPOTTY"}},
        {"scheduling": [{"preemptible": True}]},
        {"serviceAccounts": [{"email": "a@b", "scope": ["all"]}]},
    ],
    ids=str,
)
def test_google_mistakes_are_found(mistake: dict[str, Any]) -> None:
    """The check can fail."""
    _, gpu = node_configs("gcp", [])
    assert len(gcp_problems(gpu | mistake)) == 1


# ------------------------------------------------------------------------------------- spot, and a way out of none


def provider(target: str, spot: bool = True) -> Any:
    """The class that Ray finds by what the file says."""
    return _get_node_provider_cls(rendered(target, [f"cluster.spot={str(spot).lower()}"])["provider"])


def test_ray_finds_our_providers() -> None:
    """They are Ray's own, bootstrap and all, and on-demand clusters have Ray's own itself."""
    for target in ("aws", "gcp"):
        ours, rays = provider(target), provider(target, spot=False)
        assert ours.__name__ == "SpotFirst"
        assert issubclass(ours, rays)
        assert ours.bootstrap_config is rays.bootstrap_config


def test_ray_alone_still_asks_for_spot_again() -> None:
    """Why there are providers of our own: should this fail one day, two node types with a `priority` will do."""
    monitor = CloudResourceMonitor()
    for status in (Instance.ALLOCATION_FAILED, Instance.ALLOCATION_TIMEOUT):
        monitor.notify([InstanceUpdateEvent(instance_type="spot", new_instance_status=status)])
        known = monitor.get_recoverable_resource_availabilities()
        assert known == ({"spot": 0.0} if status == Instance.ALLOCATION_TIMEOUT else {})


class Amazon:
    """EC2 with some machines left."""

    def __init__(self, spot: int, on_demand: int) -> None:
        self.left = {True: spot, False: on_demand}
        self.started: list[bool] = []

    def create_instances(self, MaxCount: int, **call: Any) -> list[Any]:
        """As boto3's: fewer than asked for where there are some, an error where there are none."""
        assert not aws_problems({key: value for key, value in call.items() if key != "MinCount"})
        spot = "InstanceMarketOptions" in call
        count = min(MaxCount, self.left[spot])
        if not count:
            raise ClientError(
                {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}, "RunInstances"
            )
        self.left[spot] -= count
        self.started += [spot] * count
        started = range(len(self.started) - count, len(self.started))
        return [
            SimpleNamespace(id=f"i-{n}", instance_id=f"i-{n}", state_reason=None, state={"Name": "pending"})
            for n in started
        ]


def aws_provider(amazon: Amazon) -> Any:
    made = object.__new__(provider("aws"))
    made.provider_config, made.cluster_name = rendered("aws", [])["provider"], "raytune-ds"
    made.cache_stopped_nodes, made.ec2_fail_fast = False, amazon
    return made


@pytest.mark.parametrize(
    ("spot", "on_demand", "started"),
    [(3, 9, [True, True, True]), (1, 9, [True, False, False]), (0, 9, [False, False, False])],
)
def test_aws_on_demand_for_what_is_missing(spot: int, on_demand: int, started: list[bool]) -> None:
    """All of it, or the rest."""
    amazon = Amazon(spot, on_demand)
    _, gpu = node_configs("aws", [])
    nodes = aws_provider(amazon).create_node(
        {**gpu, "SubnetIds": ["subnet-1"]}, {"ray-node-type": "worker"}, 3
    )
    assert amazon.started == started
    assert sorted(nodes) == ["i-0", "i-1", "i-2"]


def test_aws_has_none_at_all() -> None:
    """Ray is told, as by its own provider."""
    _, gpu = node_configs("aws", [])
    with pytest.raises(NodeLaunchException):
        aws_provider(Amazon(0, 0)).create_node({**gpu, "SubnetIds": ["subnet-1"]}, {}, 1)


class Google:
    """Compute Engine with some machines left."""

    def __init__(self, spot: int, on_demand: int) -> None:
        self.left = {True: spot, False: on_demand}
        self.started: list[bool] = []

    def create_instances(self, config: dict[str, Any], labels: dict[str, str], count: int) -> list[Any]:
        """As Ray's: all of them, or an error of no class in particular."""
        assert not gcp_problems(config)
        assert config["scheduling"]["onHostMaintenance"] == "TERMINATE"
        spot = "provisioningModel" in config["scheduling"]
        if self.left[spot] < count:
            raise Exception({"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED"}]})
        self.left[spot] -= count
        self.started += [spot] * count
        return [({}, f"node-{len(self.started)}-{labels['kind']}")]


@pytest.mark.parametrize(
    ("spot", "on_demand", "started"),
    [(3, 9, [True, True, True]), (1, 9, [True, False, False]), (0, 9, [False, False, False])],
)
def test_google_on_demand_for_what_is_missing(spot: int, on_demand: int, started: list[bool]) -> None:
    """Machine by machine."""
    google = Google(spot, on_demand)
    made = object.__new__(provider("gcp"))
    made.lock, made.cache_stopped_nodes, made.resources = RLock(), False, {GCPNodeType.COMPUTE: google}
    _, gpu = node_configs("gcp", [])
    nodes = made.create_node(gpu, {"kind": "worker"}, 3)
    assert google.started == started
    assert len(nodes) == 3
