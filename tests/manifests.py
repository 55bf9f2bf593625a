"""Kubernetes manifests held against schemas, and against what no schema says.

The schemas of Ray's kinds are KubeRay's CRDs in the folder that RAYTUNE_KUBERAY_CRDS names; those of Kubernetes' own
kinds come with kubernetes-validate. An API server takes defaults, drops nulls and calls an unknown field an error; so
does this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Manifest = dict[str, Any]

CRDS = os.environ.get("RAYTUNE_KUBERAY_CRDS", "")
NO_CRDS = "" if CRDS and Path(CRDS).is_dir() else "RAYTUNE_KUBERAY_CRDS names no folder with KubeRay's CRDs"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
    },
}
# What KubeRay leaves free for the names it makes from this one.
_LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}


def load(text: str) -> list[Manifest]:
    """The documents of a file."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document is not None]


def is_ray(document: Manifest) -> bool:
    """Whether a CRD of KubeRay describes it."""
    return str(document["apiVersion"]).startswith("ray.io/")


def schema_problems(document: Manifest) -> list[str]:
    """What the schema of its kind refuses, each with its place."""
    if not is_ray(document):
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except (
            kubernetes_validate.ValidationError,
            kubernetes_validate.SchemaNotFoundError,
        ) as error:
            return [f"{document['kind']}: {getattr(error, 'path', '')}: {error.message}"]
        return []
    errors = crd_validator(document["kind"], document["apiVersion"]).iter_errors(_without_nulls(document))
    return [f"{error.json_path}: {error.message}" for error in errors]


@cache
def crd_validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """Of one version of one of Ray's kinds."""
    crd = yaml.load((Path(CRDS) / f"{kind.lower()}s.yaml").read_bytes(), yaml.CSafeLoader)
    version = api_version.partition("/")[2]
    schema = next(v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version)
    strict = _strict(schema)
    strict["properties"]["metadata"] = _METADATA
    strict["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft202012Validator(strict)


def _strict(schema: Manifest) -> Manifest:
    """An OpenAPI schema of a CRD as the API server reads it."""
    made = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if isinstance(schema.get("items"), dict):
        made["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"])
    if properties := schema.get("properties"):
        made["properties"] = {name: _strict(value) for name, value in properties.items()}
        made["required"] = [n for n in schema.get("required", ()) if "default" not in properties.get(n, {})]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------- what no schema says


def rule_problems(documents: list[Manifest]) -> list[str]:
    """What API server, KubeRay or Kueue would refuse, or wait for without an end, although the schemas allow it."""
    config_maps = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    found = []
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        found += [f"{where}: {problem}" for problem in _pod_problems(document, config_maps)]
        if is_ray(document):
            found += [f"{where}: {p}" for rule in _RAY_RULES for p in rule(document, ray_cluster(document))]
        if document["kind"] == "StatefulSet":
            labels = document["spec"]["template"]["metadata"]["labels"]
            if not document["spec"]["selector"]["matchLabels"].items() <= labels.items():
                found.append(f"{where}: its selector does not select its own pods")
    return found


def ray_cluster(document: Manifest) -> Manifest:
    """The RayClusterSpec in one of Ray's kinds."""
    spec: Manifest = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(value: Any) -> Iterator[Manifest]:
    """Every pod spec in a document."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for part in value.values():
            yield from pods(part)
    elif isinstance(value, list):
        for part in value:
            yield from pods(part)


def _pod_problems(document: Manifest, config_maps: set[str]) -> Iterator[str]:
    for pod in pods(document):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        for volume in volumes.values():
            if (name := volume.get("configMap", {}).get("name")) and name not in config_maps:
                yield f"volume {volume['name']}: there is no ConfigMap {name} in the file"
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    yield f"container {container['name']}: there is no volume {mount['name']}"
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            for name in requests.keys() & limits.keys():
                if "/" in name and requests[name] != limits[name]:
                    yield f"container {container['name']}: {name}: requests and limits must be the same"
                if quantity(requests[name]) > quantity(limits[name]):
                    yield f"container {container['name']}: {name}: asks for more than its limit"


def quantity(value: str | int) -> float:
    """A Kubernetes quantity as a number: 500m as 0.5, 1Gi as 2**30."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(value)).groups()  # type: ignore[union-attr]
    powers = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return float(number) * powers[unit]


def _name(document: Manifest, cluster: Manifest) -> Iterator[str]:
    name = document["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "its name must be small letters, digits and '-', and begin with a letter"
    if len(name) > _LONGEST_NAME[document["kind"]]:
        yield f"its name is longer than {_LONGEST_NAME[document['kind']]} characters"


def _replicas(document: Manifest, cluster: Manifest) -> Iterator[str]:
    for group in cluster.get("workerGroupSpecs", ()):
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 2**31):
            yield f"group {group['groupName']}: replicas must lie between minReplicas and maxReplicas"


def _autoscaler(document: Manifest, cluster: Manifest) -> Iterator[str]:
    if not cluster.get("enableInTreeAutoscaling"):
        return
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())]
    if any(group["template"]["spec"].get("restartPolicy", "Never") != "Never" for group in groups):
        yield "the autoscaler needs restartPolicy Never, or none"
    if "kueue.x-k8s.io/queue-name" in document["metadata"].get("labels", {}):
        yield "Kueue admits a fixed number of pods; the autoscaler must be off"


def _token(document: Manifest, cluster: Manifest) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") == "token" and "rayVersion" not in cluster:
        yield "authOptions.mode token needs rayVersion"


def _redis(document: Manifest, cluster: Manifest) -> Iterator[str]:
    if "gcsFaultToleranceOptions" in cluster and "redis-password" in cluster["headGroupSpec"].get(
        "rayStartParams", {}
    ):
        yield "the password of Redis belongs into gcsFaultToleranceOptions"


def _job(document: Manifest, cluster: Manifest) -> Iterator[str]:
    if document["kind"] != "RayJob":
        return
    spec = document["spec"]
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished has no meaning without shutdownAfterJobFinishes"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode makes no second attempt; backoffLimit must be 0"


_RAY_RULES: tuple[Callable[[Manifest, Manifest], Iterator[str]], ...] = (
    _name,
    _replicas,
    _autoscaler,
    _token,
    _redis,
    _job,
)
