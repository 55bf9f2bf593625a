"""docker/: what can be known of the image and of the compose file without building or starting them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ds.compose import compose
from raytune_ds.deploy.render import render

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
PINNED = re.compile(r":[\w.-]+@sha256:[0-9a-f]{64}$")


def _compose(*overrides: str) -> dict[str, Any]:
    text, _ = render(compose([], list(overrides)), "compose")
    return yaml.safe_load(text)


def _stages() -> dict[str, str]:
    """The instructions of each stage of the Dockerfile, lines joined and comments gone."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", text, flags=re.MULTILINE)
    return {
        name: f"FROM {base}\n{body}"
        for base, name, body in zip(*(parts[i::3] for i in (1, 2, 3)), strict=True)
    }


def _schema_problems(path: Path) -> str:
    command = [
        BIN / "check-jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "--output-format=json",
        path,
    ]
    return "".join(
        error["path"] + ": " + error["message"]
        for error in json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)[
            "errors"
        ]
    )


def _lint(path: Path) -> str:
    done = subprocess.run([BIN / "hadolint", "--no-color", path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- compose


def test_compose_file_fits_the_schema() -> None:
    assert _schema_problems(DOCKER / "compose.yaml") == ""


def test_schema_check_finds_a_planted_mistake(tmp_path: Path) -> None:
    document = _compose()
    document["services"]["worker"]["restart_policy"] = "always"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(document))
    assert "restart_policy" in _schema_problems(tmp_path / "compose.yaml")


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = [port for service in _compose()["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_environment_is_handed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    text, _ = render(compose([], ["cluster.pass_env=[MY_SECRET]"]), "compose")
    assert "hunter2" not in text
    for name in ("head", "worker", "gpu-worker"):
        environment = yaml.safe_load(text)["services"][name]["environment"]
        assert environment["MY_SECRET"] is None
        assert environment["RAY_AUTH_TOKEN"] is None
        assert "HF_TOKEN" not in environment


@pytest.mark.parametrize(
    ("overrides", "replicas", "cpus"),
    [
        ([], 2, 1),
        (["scaling.num_workers=3", "scaling.cpus_per_worker=2"], 3, 2),
        (["scaling.num_workers=10", "scaling.use_gpu=false", "cluster.cpus_per_node=4"], 3, 4),
    ],
)
def test_containers_have_room_for_the_run(overrides: list[str], replicas: int, cpus: int) -> None:
    worker = _compose(*overrides)["services"]["worker"]
    assert worker["deploy"]["replicas"] == replicas
    assert f"--num-cpus={cpus}" in worker["command"]


def test_a_run_finds_its_storage_on_every_node() -> None:
    services = _compose("cluster.shared_dir=/mnt/all")["services"]
    for name in ("head", "worker", "gpu-worker"):
        assert "${RAYTUNE_SHARED:-shared}:/mnt/all" in services[name]["volumes"]


def test_an_image_of_ones_own_is_taken_everywhere() -> None:
    services = _compose("cluster.image=registry.example/mine:3")["services"]
    assert {services[name]["image"].partition(":-")[2] for name in ("head", "worker", "gpu-worker")} == {
        "registry.example/mine:3}"
    }


def test_images_of_others_are_pinned_by_digest() -> None:
    services = _compose()["services"]
    assert PINNED.search(services["prometheus"]["image"])
    assert PINNED.search(services["grafana"]["image"])


def test_gpus_are_asked_for_in_their_profile_alone() -> None:
    services = _compose()["services"]
    with_gpus = {name for name, service in services.items() if "resources" in service.get("deploy", {})}
    assert (
        with_gpus == {"gpu-worker"} == {name for name, service in services.items() if "profiles" in service}
    )


# --------------------------------------------------------------------------------------------- monitoring


def test_prometheus_asks_the_nodes_where_they_answer() -> None:
    services = _compose()["services"]
    jobs = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    (nodes,) = jobs[0]["dns_sd_configs"]
    assert set(nodes["names"]) == {"head", "worker", "gpu-worker"}
    for name in nodes["names"]:
        assert f"--metrics-export-port={nodes['port']}" in services[name]["command"]


def test_what_compose_mounts_is_there() -> None:
    services = _compose()["services"]
    mounted = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    files = {name for name in mounted if name.startswith("./")}
    assert files == {"./prometheus.yaml", "./grafana/provisioning", "./grafana/dashboards"}
    assert (DOCKER / "prometheus.yaml").is_file()
    assert (DOCKER / "grafana" / "provisioning").is_dir()
    assert (DOCKER / "grafana" / "dashboards" / "raytune_ds.json").is_file()


def test_grafana_reads_what_compose_gives_it() -> None:
    services = _compose()["services"]
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" == services["head"]["environment"]["RAY_PROMETHEUS_HOST"]
    providers = yaml.safe_load((provisioning / "dashboards" / "dashboards.yaml").read_text())["providers"]
    targets = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert {provider["options"]["path"] for provider in providers} < targets
    written = services["head"]["environment"]["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"]
    assert f"dashboards:{written}" in services["head"]["volumes"]
    assert "dashboards:/etc/grafana/dashboards/ray:ro" in services["grafana"]["volumes"]


# --------------------------------------------------------------------------------------------------- image


def test_hadolint_has_nothing_to_say() -> None:
    assert _lint(DOCKER / "Dockerfile") == ""


def test_hadolint_finds_a_planted_mistake(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("USER 1000", "USER root"))
    assert "DL3002" in _lint(tmp_path / "Dockerfile")


def test_both_images_run_as_user_1000() -> None:
    stages = _stages()
    for target in ("cpu", "cuda"):
        assert re.findall(r"^USER (.*)$", stages[target], flags=re.MULTILINE)[-1:] == ["1000"]


def test_base_image_is_an_argument_pinned_by_digest() -> None:
    (default,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert PINNED.search(default)
    stages = _stages()
    bases = {body.split()[1] for body in stages.values()}
    assert bases - stages.keys() == {"${BASE_IMAGE}"}


def test_compilers_and_cuda_extras_stay_where_they_belong() -> None:
    stages = _stages()
    assert {name for name, body in stages.items() if re.search(r"\bg\+\+", body)} == {"build"}
    assert {name for name, body in stages.items() if "gpu.in" in body} == {"build", "cuda"}
    for target in ("cpu", "cuda"):
        assert stages[target].startswith("FROM dependencies\n")


def test_nothing_secret_is_asked_for_at_build_time() -> None:
    names = re.findall(r"^(?:ARG|ENV) (\w+)", DOCKERFILE, flags=re.MULTILINE)
    assert names
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]


def test_build_context_holds_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied: set[str] = set()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE):
        copied |= set(sources.split())
    assert let_in == copied
    assert all((ROOT / name).exists() for name in copied)


def test_what_the_image_adds_to_the_lock_is_pinned() -> None:
    gpu = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    wanted = {re.split("[<>=]", name)[0] for name in gpu}
    pins = dict(
        line.split("==") for line in (DOCKER / "constraints.txt").read_text().splitlines() if line[0] != "#"
    )
    assert pins.keys() == wanted
