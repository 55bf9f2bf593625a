"""KubeRay's manifests: the schemas and rules of what reads them, and the config they are made from."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import yaml

from raytune_ds.compose import compose
from raytune_ds.config import Config
from raytune_ds.deploy.render import TARGETS, render
from raytune_ds.errors import UserError
from tests.manifests import (
    NO_CRDS,
    Manifest,
    is_ray,
    load,
    pods,
    quantity,
    ray_cluster,
    rule_problems,
    schema_problems,
)

KUBERAY = [target for target in TARGETS if target.startswith("kuberay")]
CONFIGS: dict[str, list[str]] = {
    "default": [],
    "bucket, queue, no redis": [
        "run.storage=s3://bucket/runs",
        "run.name=Tickets_2.0",
        "run.resume=never",
        "adapter.r=12",
        "model.name=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "cluster.kubernetes.claim=null",
        "cluster.kubernetes.env_from=null",
        "cluster.kubernetes.service_account=reader",
        "cluster.kubernetes.queue=gpus",
        "cluster.kubernetes.redis=null",
    ],
    "7 workers on nodes of 8 GPUs": [
        "scaling.num_workers=7",
        "scaling.cpus_per_worker=12",
        "adapter.kind=none",
        "cluster.gpus_per_node=8",
        "cluster.cpus_per_node=96",
        "cluster.memory_gib_per_node=1000",
        "cluster.min_nodes=1",
        "cluster.max_nodes=3",
        "cluster.kubernetes.redis=redis.infra:6380",
        "cluster.kubernetes.shm_gib=200",
        "cluster.kubernetes.gpu_resource=amd.com/gpu",
    ],
    "two to a node, no GPUs": [
        "scaling.num_workers=3",
        "scaling.cpus_per_worker=2",
        "cluster.gpus_per_node=0",
        "cluster.cpus_per_node=4",
    ],
}


def made(target: str, overrides: list[str]) -> list[Manifest]:
    return load(rendered(target, tuple(overrides)))


@cache
def rendered(target: str, overrides: tuple[str, ...]) -> str:
    return render(compose([], overrides), target)[0]


def ray_kind(documents: list[Manifest]) -> Manifest:
    return next(document for document in documents if is_ray(document))


def gpu_group(documents: list[Manifest]) -> Manifest:
    (group,) = ray_cluster(ray_kind(documents))["workerGroupSpecs"]
    return group


def cases() -> list[Any]:
    return [
        pytest.param(target, overrides, id=f"{target}, {name}")
        for target in KUBERAY
        for name, overrides in CONFIGS.items()
        if not (target == "kuberay-service" and "no GPUs" in name)
    ]


# --------------------------------------------------------------------------------- schemas and rules


@pytest.mark.parametrize(("target", "overrides"), cases())
def test_kubernetes_own_kinds_keep_to_their_schemas_and_all_to_the_rules(
    target: str, overrides: list[str]
) -> None:
    documents = made(target, overrides)
    assert [problem for d in documents if not is_ray(d) for problem in schema_problems(d)] == []
    assert rule_problems(documents) == []


@pytest.mark.skipif(bool(NO_CRDS), reason=NO_CRDS)
@pytest.mark.parametrize(("target", "overrides"), cases())
def test_rays_kinds_keep_to_the_crds(target: str, overrides: list[str]) -> None:
    (document,) = (d for d in made(target, overrides) if is_ray(d))
    assert schema_problems(document) == []


Plant = Callable[[list[Manifest]], Any]


def of_kind(kind: str, documents: list[Manifest]) -> Manifest:
    return next(document for document in documents if document["kind"] == kind)


def cluster_of(documents: list[Manifest]) -> Manifest:
    return ray_cluster(ray_kind(documents))


def worker(documents: list[Manifest]) -> Manifest:
    container: Manifest = gpu_group(documents)["template"]["spec"]["containers"][0]
    return container


def head_pod(documents: list[Manifest]) -> Manifest:
    pod: Manifest = cluster_of(documents)["headGroupSpec"]["template"]["spec"]
    return pod


# (target, what is done to its documents, what the answer says)
CRD_MISTAKES: dict[str, tuple[str, Plant, str]] = {
    "a field of another spelling": (
        "kuberay-job",
        lambda d: ray_kind(d)["spec"].update(entryPoint="python"),
        "entryPoint",
    ),
    "a field deep in a pod that is none": (
        "kuberay-job",
        lambda d: worker(d)["securityContext"].update(allowPrivilegedEscalation=False),
        "allowPrivilegedEscalation",
    ),
    "text for a whole number": (
        "kuberay-job",
        lambda d: ray_kind(d)["spec"].update(backoffLimit="3"),
        "backoffLimit",
    ),
    "text for yes or no": (
        "kuberay-cluster",
        lambda d: cluster_of(d).update(enableInTreeAutoscaling="true"),
        "enableInTreeAutoscaling",
    ),
    "a number for a start parameter": (
        "kuberay-cluster",
        lambda d: cluster_of(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "num-cpus",
    ),
    "an autoscaler there is not": (
        "kuberay-job",
        lambda d: cluster_of(d)["autoscalerOptions"].update(version="v3"),
        "'v3' is not one of",
    ),
    "a mode of authentication there is not": (
        "kuberay-service",
        lambda d: cluster_of(d)["authOptions"].update(mode="password"),
        "'password' is not one of",
    ),
    "a group without a name": (
        "kuberay-cluster",
        lambda d: gpu_group(d).pop("groupName"),
        "'groupName' is a required property",
    ),
    "no pods for the head": (
        "kuberay-cluster",
        lambda d: cluster_of(d)["headGroupSpec"].pop("template"),
        "'template' is a required property",
    ),
    "no cluster for a service": (
        "kuberay-service",
        lambda d: ray_kind(d)["spec"].pop("rayClusterConfig"),
        "'rayClusterConfig' is a required property",
    ),
    "a toleration beside the pod": (
        "kuberay-job",
        lambda d: gpu_group(d)["template"].update(tolerations=[{"operator": "Exists"}]),
        "tolerations",
    ),
    "the job's fields in its cluster": (
        "kuberay-job",
        lambda d: cluster_of(d).update(shutdownAfterJobFinishes=True),
        "shutdownAfterJobFinishes",
    ),
    "a RayService's section in a RayJob": (
        "kuberay-job",
        lambda d: ray_kind(d)["spec"].update(rayClusterConfig=ray_kind(d)["spec"].pop("rayClusterSpec")),
        "rayClusterConfig",
    ),
    "a unit there is not": (
        "kuberay-job",
        lambda d: worker(d)["resources"]["limits"].update(memory="64GB"),
        "'64GB' does not match",
    ),
    "a fraction where a number or text belongs": (
        "kuberay-job",
        lambda d: worker(d)["resources"]["limits"].update(cpu=8.5),
        "8.5 is not of type",
    ),
    "a list for a port": (
        "kuberay-job",
        lambda d: worker(d)["readinessProbe"]["httpGet"].update(port=[52365]),
        "[52365] is not of type",
    ),
    "a mapping for a list": (
        "kuberay-cluster",
        lambda d: head_pod(d).update(volumes={"shm": {"emptyDir": {}}}),
        "is not of type 'array'",
    ),
    "null for what must be there": (
        "kuberay-cluster",
        lambda d: head_pod(d)["containers"][0].update(name=None),
        "'name' is a required property",
    ),
    "a secret's value in place of its key": (
        "kuberay-job",
        lambda d: cluster_of(d)["gcsFaultToleranceOptions"].update(redisPassword="hunter2"),
        "redisPassword",
    ),
    "a number for a label": (
        "kuberay-job",
        lambda d: ray_kind(d)["metadata"]["labels"].update(tier=1),
        "1 is not of type 'string'",
    ),
}


@pytest.mark.skipif(bool(NO_CRDS), reason=NO_CRDS)
@pytest.mark.parametrize("mistake", CRD_MISTAKES)
def test_the_crds_find_a_mistake(mistake: str) -> None:
    target, plant, expected = CRD_MISTAKES[mistake]
    documents = made(target, [])
    assert schema_problems(ray_kind(documents)) == []
    plant(documents)
    assert expected in "\n".join(schema_problems(ray_kind(documents)))


CORE_MISTAKES: dict[str, tuple[str, Plant, str]] = {
    "a NetworkPolicy's port beside its list": (
        "NetworkPolicy",
        lambda d: d["spec"]["ingress"][1].update(port=8265),
        "port",
    ),
    "a peer's selector that is none": (
        "NetworkPolicy",
        lambda d: d["spec"]["ingress"][0]["from"][0].update(matchLabels={}),
        "matchLabels",
    ),
    "text for a number of pods": (
        "StatefulSet",
        lambda d: d["spec"].update(replicas="one"),
        "'one' is not of type",
    ),
    "a StatefulSet that selects nothing": (
        "StatefulSet",
        lambda d: d["spec"].pop("selector"),
        "'selector' is a required property",
    ),
    "a version that a kind does not have": (
        "NetworkPolicy",
        lambda d: d.update(apiVersion="networking.k8s.io/v1beta7"),
        "networking.k8s.io/v1beta7",
    ),
    "a mapping in a ConfigMap": (
        "ConfigMap",
        lambda d: d["data"].update({"config.yaml": {"run": {}}}),
        "is not of type 'string'",
    ),
}


@pytest.mark.parametrize("mistake", CORE_MISTAKES)
def test_the_schemas_of_kubernetes_find_a_mistake(mistake: str) -> None:
    kind, plant, expected = CORE_MISTAKES[mistake]
    document = of_kind(kind, made("kuberay-job", []))
    assert schema_problems(document) == []
    plant(document)  # type: ignore[arg-type]
    assert expected in "\n".join(schema_problems(document))


RULE_MISTAKES: dict[str, tuple[str, Plant, str]] = {
    "a name that begins with a digit": (
        "kuberay-job",
        lambda d: ray_kind(d)["metadata"].update(name="7b-lora"),
        "begin with a letter",
    ),
    "a name that leaves no room": (
        "kuberay-job",
        lambda d: ray_kind(d)["metadata"].update(name="n" * 48),
        "longer than 47",
    ),
    "more replicas than there may be": (
        "kuberay-cluster",
        lambda d: gpu_group(d).update(replicas=9),
        "between minReplicas and maxReplicas",
    ),
    "pods that restart beside the autoscaler": (
        "kuberay-cluster",
        lambda d: head_pod(d).update(restartPolicy="Always"),
        "restartPolicy Never",
    ),
    "a queue and the autoscaler": (
        "kuberay-job",
        lambda d: ray_kind(d)["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"}),
        "the autoscaler must be off",
    ),
    "a token without a version": (
        "kuberay-service",
        lambda d: cluster_of(d).pop("rayVersion"),
        "needs rayVersion",
    ),
    "the password of Redis among the start parameters": (
        "kuberay-cluster",
        lambda d: cluster_of(d)["headGroupSpec"]["rayStartParams"].update({"redis-password": "$X"}),
        "belongs into gcsFaultToleranceOptions",
    ),
    "a cluster that is deleted late and never": (
        "kuberay-job",
        lambda d: ray_kind(d)["spec"].update(shutdownAfterJobFinishes=False),
        "without shutdownAfterJobFinishes",
    ),
    "attempts that nobody makes": (
        "kuberay-job",
        lambda d: ray_kind(d)["spec"].update(submissionMode="InteractiveMode"),
        "makes no second attempt",
    ),
    "a mount without a volume": (
        "kuberay-job",
        lambda d: head_pod(d)["volumes"].pop(),
        "there is no volume config",
    ),
    "a ConfigMap that is not there": (
        "kuberay-job",
        lambda d: d.remove(of_kind("ConfigMap", d)),
        "there is no ConfigMap",
    ),
    "fewer GPUs allowed than asked for": (
        "kuberay-job",
        lambda d: worker(d)["resources"]["requests"].update({"nvidia.com/gpu": 2}),
        "must be the same",
    ),
    "more memory asked for than allowed": (
        "kuberay-job",
        lambda d: worker(d)["resources"]["requests"].update(memory="65Gi"),
        "more than its limit",
    ),
    "a StatefulSet that selects other pods": (
        "kuberay-job",
        lambda d: of_kind("StatefulSet", d)["spec"]["selector"]["matchLabels"].update(x="y"),
        "does not select its own pods",
    ),
}


@pytest.mark.parametrize("mistake", RULE_MISTAKES)
def test_a_rule_finds_a_mistake(mistake: str) -> None:
    target, plant, expected = RULE_MISTAKES[mistake]
    documents = made(target, [])
    assert rule_problems(documents) == []
    plant(documents)
    assert expected in "\n".join(rule_problems(documents))


# ---------------------------------------------------------------- the config, and what it is given


@pytest.mark.parametrize(("target", "overrides"), cases())
def test_the_pods_have_room_for_what_the_config_asks(target: str, overrides: list[str]) -> None:
    config = compose([], overrides)
    layout = render(config, target)[1]
    group, scaling = gpu_group(made(target, overrides)), config.scaling
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get(config.cluster.kubernetes.gpu_resource, 0))
    assert int(group["rayStartParams"]["num-gpus"]) == gpus
    by_cpu = int(quantity(limits["cpu"])) // scaling.cpus_per_worker
    on_a_pod = min(by_cpu, gpus) if layout.use_gpu else by_cpu
    wanted = scaling.num_workers if isinstance(scaling.num_workers, int) else 1
    assert group["maxReplicas"] * on_a_pod >= wanted
    if target == "kuberay-job":
        # No run waits for pods that it could have had at once.
        assert group["replicas"] * on_a_pod >= wanted
        assert (group["replicas"] - 1) * on_a_pod < wanted or scaling.num_workers == "auto"
    assert (
        ray_cluster(ray_kind(made(target, overrides)))["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    )


@pytest.mark.parametrize("target", KUBERAY)
def test_rays_autoscaler_sees_what_the_layout_says(target: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = compose([], CONFIGS["7 workers on nodes of 8 GPUs"])
    text, layout = render(config, target)
    cluster = ray_cluster(ray_kind(load(text)))
    read = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "x", "namespace": "y"}, "spec": cluster}
    )
    head, gpu = (read["available_node_types"][name] for name in ("headgroup", "gpu"))
    assert head["resources"]["CPU"] == 0
    memory = layout.node.memory_gib << 30
    assert gpu["resources"] == {"CPU": layout.node.cpus, "GPU": layout.node.gpus, "memory": memory}
    assert (gpu["min_workers"], gpu["max_workers"]) == (layout.min_nodes, layout.max_nodes)
    assert read["idle_timeout_minutes"] == config.cluster.idle_timeout_minutes


def test_seven_workers_need_one_node_of_eight_gpus() -> None:
    group = gpu_group(made("kuberay-job", CONFIGS["7 workers on nodes of 8 GPUs"]))
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 3)
    pod = group["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "96", "memory": "1000Gi", "amd.com/gpu": 8}
    assert pod["tolerations"] == [{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "200Gi"}


def test_the_job_carries_the_runs_config(tmp_path: Any) -> None:
    for overrides in CONFIGS.values():
        documents = made("kuberay-job", overrides)
        spec = ray_kind(documents)["spec"]
        assert spec["entrypoint"] == "python -m raytune_ds.train --config /etc/raytune_ds/config.yaml"
        file = tmp_path / "config.yaml"
        file.write_text(of_kind("ConfigMap", documents)["data"]["config.yaml"])
        asked, given = compose([], overrides), compose([file], [])
        assert given.model_dump(exclude={"run", "cluster"}) == asked.model_dump(exclude={"run", "cluster"})
        assert given.run.name == asked.run.name or asked.run.name is None
        assert given.run.storage in ("/shared/raytune_ds", "s3://bucket/runs")
        (mount,) = (m for m in head_pod(documents)["containers"][0]["volumeMounts"] if m["name"] == "config")
        assert mount["mountPath"] == "/etc/raytune_ds"


def job_run_name(overrides: list[str]) -> str:
    document = of_kind("ConfigMap", made("kuberay-job", overrides))
    return str(yaml.safe_load(document["data"]["config.yaml"])["run"]["name"])


def test_a_run_without_a_name_gets_one_that_its_next_attempt_has_too() -> None:
    name = job_run_name([])
    assert re.fullmatch(r"tiny-deepseek-v3-demo-[0-9a-f]{6}", name)
    assert job_run_name([]) == name
    assert job_run_name(["scaling.num_workers=2", "cluster.max_nodes=4", "engine.kind=fsdp"]) == name
    assert job_run_name(["train.learning_rate=1e-3"]) != name
    assert job_run_name(["run.name=mine"]) == "mine"
    assert ray_kind(made("kuberay-job", []))["spec"]["backoffLimit"] > 0
    assert ray_kind(made("kuberay-job", ["run.resume=never"]))["spec"]["backoffLimit"] == 0


def test_names_that_differ_stay_different_in_kubernetes() -> None:
    names = ["tickets", "Tickets", "tickets.", "7b", "a" * 128, "a" * 127 + "b", "_", "-"]
    documents = [made("kuberay-job", [f"run.name={name}"]) for name in names]
    labels = [ray_kind(d)["metadata"]["name"] for d in documents]
    assert len(set(labels)) == len(names)
    assert labels[0] == "tickets"
    assert [problem for d in documents for problem in rule_problems(d)] == []
    assert rule_problems(made("kuberay-service", [f"run.name={names[4]}"])) == []


def llm_config(overrides: list[str]) -> Manifest:
    serve = yaml.safe_load(ray_kind(made("kuberay-service", overrides))["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = application["args"]["llm_configs"]
    return dict(llm)


def test_the_service_serves_what_the_job_leaves() -> None:
    name = job_run_name([])
    llm = llm_config([])
    assert llm["engine_kwargs"]["lora_modules"] == [
        {"name": "tiny-deepseek-v3:final", "path": f"/shared/raytune_ds/{name}/final"}
    ]
    llm = llm_config(CONFIGS["bucket, queue, no redis"])
    assert llm["model_loading_config"]["model_source"] == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert llm["lora_config"] == {"dynamic_lora_loading_path": "s3://bucket/runs/Tickets_2.0"}
    assert "lora_modules" not in llm["engine_kwargs"]
    assert llm["engine_kwargs"]["max_lora_rank"] == 16  # of the ranks that vLLM knows the first that holds 12
    full = CONFIGS["7 workers on nodes of 8 GPUs"]
    llm = llm_config([*full, "run.name=full"])
    assert llm["model_loading_config"] == {
        "model_id": "full",
        "model_source": "/shared/raytune_ds/full/final",
    }
    assert llm["engine_kwargs"] == {"tensor_parallel_size": 8, "max_model_len": 2048}


@pytest.mark.parametrize(("target", "overrides"), cases())
def test_pods_have_no_more_rights_than_they_need(target: str, overrides: list[str]) -> None:
    found = [pod for document in made(target, overrides) for pod in pods(document)]
    assert len(found) >= 2
    for pod in found:
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            for variable in container.get("env", ()):
                assert variable["name"] in ("HF_HOME", "RAYTUNE_DS_MAY_GROW") or set(
                    variable["valueFrom"]
                ) == {"secretKeyRef"}


@pytest.mark.parametrize("target", KUBERAY)
def test_who_may_reach_the_pods(target: str) -> None:
    documents = made(target, [])
    spec = of_kind("NetworkPolicy", documents)["spec"]
    own = spec["podSelector"]["matchLabels"]
    cluster = cluster_of(documents)
    templates = [cluster["headGroupSpec"]["template"], gpu_group(documents)["template"]]
    templates.append(of_kind("StatefulSet", documents)["spec"]["template"])
    if target == "kuberay-job":
        templates.append(ray_kind(documents)["spec"]["submitterPodTemplate"])
    for template in templates:
        assert own.items() <= template["metadata"]["labels"].items()
    siblings, namespace, metrics = spec["ingress"]
    assert siblings == {"from": [{"podSelector": {"matchLabels": own}}]}
    ports = [8265, 8000] if target == "kuberay-service" else [8265]
    assert [port["port"] for port in namespace["ports"]] == ports
    assert [port["port"] for port in metrics["ports"]] == [8080]


def test_redis_is_where_the_cluster_looks_for_it() -> None:
    for target in KUBERAY:
        documents = made(target, [])
        address = cluster_of(documents)["gcsFaultToleranceOptions"]["redisAddress"]
        service = of_kind("Service", documents)
        assert address == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
        labels = of_kind("StatefulSet", documents)["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        elsewhere = made(target, ["cluster.kubernetes.redis=redis.infra:6380"])
        assert cluster_of(elsewhere)["gcsFaultToleranceOptions"]["redisAddress"] == "redis.infra:6380"
        without = made(target, ["cluster.kubernetes.redis=null"])
        assert "gcsFaultToleranceOptions" not in cluster_of(without)
        for documents in (elsewhere, without):
            assert {d["kind"] for d in documents}.isdisjoint({"StatefulSet", "Service"})


def test_a_queue_fixes_the_number_of_pods() -> None:
    for target in KUBERAY:
        documents = made(target, ["cluster.kubernetes.queue=gpus", "cluster.max_nodes=3"])
        assert ray_kind(documents)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        group = gpu_group(documents)
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
        assert cluster_of(documents)["enableInTreeAutoscaling"] is False


def test_probes_are_left_to_kuberay_only_where_it_knows_more() -> None:
    for target in KUBERAY:
        documents = made(target, [])
        for container in (head_pod(documents)["containers"][0], worker(documents)):
            assert ("readinessProbe" in container) == (target != "kuberay-service")
            assert ("livenessProbe" in container) == (target != "kuberay-service")


@pytest.mark.parametrize(
    ("target", "overrides", "message"),
    [
        ("kuberay-job", ["cluster.kubernetes.shm_gib=64"], "shared memory is part of a pod's memory"),
        ("kuberay-service", ["cluster.gpus_per_node=0"], "vLLM serves on GPUs"),
        ("kuberay-service", ["scaling.use_gpu=false"], "vLLM serves on GPUs"),
        ("kuberay-job", ["cluster.kubernetes.claim=null"], "the nodes of this target share none"),
        ("kuberay-job", ["scaling.num_workers=4", "cluster.max_nodes=2"], "4 nodes are needed"),
    ],
)
def test_what_can_not_work_is_refused(target: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        render(compose([], overrides), target)
    assert message in str(caught.value)


def test_a_redis_is_an_address() -> None:
    for wrong in ["redis", "redis:", "redis://x:1", "ours"]:
        with pytest.raises(UserError, match=r"cluster\.kubernetes\.redis"):
            compose([], [f"cluster.kubernetes.redis={wrong}"])
    assert Config().cluster.kubernetes.redis == "own"
