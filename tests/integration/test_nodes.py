"""The nodes of a Ray cluster, looked at by the doctor and before a run. Several raylets stand for several machines.

The scenario runs in a process of its own, since a process has one Ray. Its second node is wrong in three ways: another
peft, an interface that is not there, and a storage that is not the others'.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raytune_ds

# Every process has its own /proc/self/cwd: a path that names one folder on the good nodes and another on the bad one.
STORAGE = "/proc/self/cwd/storage"
SCENARIO = f"""
import contextlib, io, json, os, sys, time
import ray
from ray.cluster_utils import Cluster
from raytune_ds import cli, nodes, preflight
from raytune_ds.errors import UserError

folder, bad_env = sys.argv[1], json.loads(sys.argv[2])

def doctor():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["doctor", "--cluster", "--json", "run.storage={STORAGE}"])
    return code, json.loads(out.getvalue())["nodes"]

def refusal():
    try:
        preflight.preflight("{STORAGE}")
    except UserError as error:
        return str(error)

os.chdir(f"{{folder}}/good")
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
os.chdir(f"{{folder}}/bad")
bad = cluster.add_node(num_cpus=1, env_vars=bad_env)
os.chdir(f"{{folder}}/good")
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
told = {{"bad": bad.node_id[:6], "names": [node.name for node in nodes.alive()]}}
told["doctor"] = doctor()
told["refusal"] = refusal()
here = nodes.alive()
with nodes.Delegates(here) as delegates:
    told["deaf"] = [a.reason for a in delegates.run(time.sleep, 60, deadline_s=0.5).values()]
with nodes.Delegates(here) as delegates:
    told["died"] = [a.reason for a in delegates.run(os._exit, 1, deadline_s=30).values()]
cluster.remove_node(bad)
cluster.wait_for_nodes()
told["mended"] = doctor()
told["passed"] = refusal() is None
told["left"] = os.listdir("{STORAGE}")
json.dump(told, open(f"{{folder}}/told.json", "w"))
"""


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Any]]:
    """What the scenario saw."""
    folder = Path(tempfile.mkdtemp(prefix="rt"))  # short: socket paths below it have 107 characters at most
    for name in ("good", "bad", "site/peft-0.0.1.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "site/peft-0.0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n"
    )
    house = str(Path(raytune_ds.__file__).parent.parent)
    bad = {"PYTHONPATH": f"{folder}/site:{house}", "GLOO_SOCKET_IFNAME": "nosuch0"}
    # A folder of its own also for the note of the last cluster that was started, which other runs would join.
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": f"{folder}/ray",
        "PYTHONPATH": house,
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCENARIO, str(folder), json.dumps(bad)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (folder / "told.json").exists(), done.stdout + done.stderr
        yield json.loads((folder / "told.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _red(findings: list[dict[str, str]]) -> dict[str, str]:
    return {f["name"]: f["found"] for f in findings if f["status"] == "bad"}


def test_each_node_has_a_name_of_its_own(told: dict[str, Any]) -> None:
    """Although host and address are the same."""
    assert len(set(told["names"])) == 3
    assert told["bad"] in told["names"]


def test_the_doctor_finds_what_is_wrong_where_it_is(told: dict[str, Any]) -> None:
    code, nodes = told["doctor"]
    red = _red(nodes[told["bad"]])
    assert code == 2
    assert red["peft"] == "0.0.1"
    assert "GLOO_SOCKET_IFNAME = nosuch0" in red["interface"]
    assert "does not see" in red["run.storage"]


def test_an_all_reduce_that_fails_is_red_on_every_node(told: dict[str, Any]) -> None:
    """One node listens on an interface that it does not have."""
    assert all("gloo" in _red(findings) for findings in told["doctor"][1].values())


def test_good_nodes_are_not_blamed(told: dict[str, Any]) -> None:
    for node, findings in told["doctor"][1].items():
        if node != told["bad"]:
            assert not _red(findings).keys() - {"gloo"}


def test_the_mended_cluster_has_nothing_red_and_its_bandwidth_is_measured(told: dict[str, Any]) -> None:
    code, nodes = told["mended"]
    assert len(nodes) == 2
    for findings in nodes.values():
        found = {f["name"]: f["found"] for f in findings}
        assert _red(findings) == {}
        assert "all-reduce at" in found["gloo"]
        assert found["run.storage"].endswith("shared and writable")
        assert "clock" in found
    assert code == 0


def test_a_run_is_refused_before_it_starts_with_all_that_is_wrong(told: dict[str, Any]) -> None:
    bad = told["bad"]
    for words in (
        f"peft: 0.0.1 on {bad}, ",
        f"on {bad}: GLOO_SOCKET_IFNAME = nosuch0: there is no such network interface",
        f"run.storage = {STORAGE}: is not shared by all nodes",
        f"  {bad} does not see what another node wrote there",
    ):
        assert words in told["refusal"]


def test_a_run_on_nodes_that_agree_is_not_and_leaves_no_file(told: dict[str, Any]) -> None:
    assert told["passed"]
    assert told["left"] == []


def test_nodes_that_do_not_answer_are_told_from_those_that_died(told: dict[str, Any]) -> None:
    assert told["deaf"] == ["no answer after 0 s"] * 3
    assert len(told["died"]) == 3
    assert all(reason and "no answer" not in reason for reason in told["died"])
