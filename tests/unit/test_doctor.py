"""What the doctor makes of a node, and of several."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from raytune_ds import cli
from raytune_ds.doctor import agree, checks, collective, places, report
from raytune_ds.doctor.cluster import clock_finding, reach_finding
from raytune_ds.doctor.finding import Finding
from raytune_ds.doctor.versions import versions
from raytune_ds.nodes import NOT_INSTALLED, Silent
from raytune_ds.preflight import View, problems

Usage = namedtuple("Usage", "total used free")
GIB = 1 << 30


# ------------------------------------------------------------------------------------------- of one node


def _nvidia_smi(text: str | Exception) -> checks.Command:
    def run(command: list[str]) -> str:
        assert command[0] == "nvidia-smi"
        if isinstance(text, Exception):
            raise text
        return text

    return run


def test_gpus_by_kind_with_their_driver() -> None:
    finding = checks.check_gpus(_nvidia_smi("NVIDIA L40S, 46068, 550.54\nNVIDIA L40S, 46068, 550.54\n"))
    assert finding == Finding("GPUs", "ok", "2 x NVIDIA L40S 45 GiB, driver 550.54")


def test_no_gpu_is_no_mistake() -> None:
    assert checks.check_gpus(_nvidia_smi(FileNotFoundError())).status == "absent"


def test_a_driver_that_does_not_answer_is() -> None:
    finding = checks.check_gpus(_nvidia_smi(OSError("couldn't communicate with the NVIDIA driver")))
    assert (finding.status, finding.advice != "") == ("bad", True)
    assert "couldn't communicate" in finding.found


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(OSError, match="no such thing"):
        checks.run_command([sys.executable, "-c", "import sys; sys.exit('no such thing')"])


@pytest.mark.parametrize(("size", "status"), [(64 << 20, "bad"), (GIB, "warn"), (16 * GIB, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size, 0, size))
    finding = checks.check_shm(tmp_path)
    assert (finding.status, "--shm-size" in finding.advice) == (status, status != "ok")


@pytest.mark.parametrize(("free", "status"), [(GIB // 2, "bad"), (5 * GIB, "warn"), (100 * GIB, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str) -> None:
    """Also of a folder that is not there yet."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(200 * GIB, 0, free * (place == tmp_path)))
    assert checks.check_disk("disk", tmp_path / "not" / "yet").status == status


@pytest.mark.parametrize(("limit", "status"), [(1024, "warn"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, limit))
    assert checks.check_open_files().status == status


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ninja" else f"/bin/{name}")
    finding = checks.check_compiler()
    assert (finding.status, finding.found) == ("warn", "no ninja")


def test_the_hub_token_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Neither in the table nor in JSON."""
    monkeypatch.setenv("HF_TOKEN", "hf_thesecret")
    for arguments in ([], ["--json"]):
        assert cli.main(["doctor", *arguments, f"run.storage={tmp_path}"]) in (0, 2)
        captured = capsys.readouterr()
        assert "present" in captured.out
        assert "thesecret" not in captured.out + captured.err


def test_a_storage_that_can_not_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Red, with exit code 2; JSON says which."""
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--json", f"run.storage={tmp_path}/file/below"]) == 2
    told = json.loads(capsys.readouterr().out)
    (findings,) = told["nodes"].values()
    assert told["ok"] is False
    assert [f["name"] for f in findings if f["status"] == "bad"] == ["run.storage"]
    assert told["goes_with"]["nf4 + adapter"]["ddp"] == "yes"


def test_what_goes_with_what_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", f"run.storage={tmp_path}"]) in (0, 2)
    shown = capsys.readouterr().out
    assert "what goes with what" in shown
    assert "(1) a quantized weight can't be trained itself" in shown


def test_what_holds_weights_in_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    found = {f.name: f for f in checks.check_low_bits()}
    assert {f.status for f in found.values()} == {"absent"}
    assert "raytune_ds[quantization]" in found["bitsandbytes"].advice


def test_the_doctor_of_one_node_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    """On a node without GPUs: it may be called in because they can't be imported."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("has GPUs")
    code = (
        "import sys\nfrom raytune_ds import cli\n"
        f"cli.main(['doctor', '--json', 'run.storage={tmp_path}'])\n"
        "print([m for m in ('ray', 'torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "versions", lambda: {"python": "3.11.7", "peft": "not installed"})
    assert [f.status for f in checks.check_versions()] == ["ok", "bad"]


def test_raytune_ds_is_known_by_its_files() -> None:
    """Two nodes may have the same version number and different code."""
    assert versions()["raytune_ds"].endswith(")")


# ---------------------------------------------------------------------------------------- of several nodes


def _torch(**of_nodes: str) -> dict[str, list[Finding]]:
    return {node: [Finding("torch", "ok", version)] for node, version in of_nodes.items()}


def test_the_odd_version_is_red() -> None:
    judged = agree.judged(_torch(a="2.13.0", b="2.12.1", c="2.13.0"))
    assert {node: f[0].status for node, f in judged.items()} == {"a": "ok", "b": "bad", "c": "ok"}


def test_builds_for_cpu_and_gpu_are_the_same_version() -> None:
    judged = agree.judged(_torch(head="2.13.0+cpu", worker="2.13.0+cu130"))
    assert all(f[0].status == "ok" for f in judged.values())


def test_of_two_the_first_node_is_right() -> None:
    assert agree.differing({"head": "1", "worker": "2"}) == {"worker": "2"}


def test_a_token_on_some_nodes_only_is_worth_knowing() -> None:
    findings = {
        "a": [Finding("hub token", "ok", "present")],
        "b": [Finding("hub token", "absent", "none")],
    }
    assert [f[0].status for f in agree.judged(findings).values()] == ["ok", "warn"]


def test_nodes_with_the_same_finding_share_a_line() -> None:
    findings = {
        "a": [Finding("torch", "ok", "2.13.0"), Finding("clock", "ok", "fine")],
        "b": [Finding("torch", "bad", "2.12.1", "mend"), Finding("clock", "ok", "fine")],
        "c": [Finding("torch", "ok", "2.13.0"), Finding("clock", "ok", "fine")],
    }
    rows = [(nodes, f.name, f.found) for nodes, f in report.rows_of(findings)]
    assert rows == [("a, c", "torch", "2.13.0"), ("b", "torch", "2.12.1"), ("all 3", "clock", "fine")]
    assert report.exit_code(findings) == 2


def test_yellow_is_no_failure() -> None:
    assert report.exit_code({"a": [Finding("clock", "warn", "hm")]}) == 0


@pytest.mark.parametrize(
    ("skew", "doubt", "status"), [(0.5, 0.0, "ok"), (-5.0, 0.1, "bad"), (5.0, 4.0, "ok"), (90.0, 0.1, "bad")]
)
def test_clocks(skew: float, doubt: float, status: str) -> None:
    """What may be the delay of the network is not held against a clock."""
    assert clock_finding(skew, doubt).status == status


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (3e9, "ok", "3.0 GB/s"),
        (20e6, "warn", "20 MB/s"),
        (Silent("b did not come"), "bad", "b did not come"),
    ],
)
def test_reach(answer: float | Silent, status: str, words: str) -> None:
    finding = reach_finding("gloo", answer)
    assert finding.status == status
    assert words in finding.found


def test_a_node_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "CONNECT_S", 0.5)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    meeting = collective.Meeting("gloo", "127.0.0.1", collective.free_port(), ("here", "gone"))
    with pytest.raises(ConnectionError, match=r"gone did not come to 127.0.0.1:[0-9]+ of here"):
        collective.all_reduce(0, "127.0.0.1", meeting)


def test_a_first_node_that_can_not_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "CONNECT_S", 0.5)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    meeting = collective.Meeting("gloo", "127.0.0.1", collective.free_port(), ("first", "here"))
    with pytest.raises(ConnectionError, match=r"can't reach 127.0.0.1:[0-9]+ of first"):
        collective.all_reduce(1, "127.0.0.1", meeting)


def test_a_mark_is_seen_where_it_was_left_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(places, "PATIENCE_S", 0.2)
    root = str(tmp_path / "shared")
    mark = places.leave_mark(root)
    assert places.trouble(root, mark) is None
    assert "does not see" in str(places.trouble(root, mark.replace("shared", "own")))
    places.remove_mark(mark)
    assert list((tmp_path / "shared").iterdir()) == []


# ---------------------------------------------------------------------------------- what a run is refused for

SAME = dict.fromkeys(("ray", "torch", "transformers", "peft", "deepspeed", "raytune_ds"), "1")


def _told(**answers: View | Silent) -> list[str]:
    return list(problems("/runs", answers))


def test_nodes_that_agree() -> None:
    assert _told(a=View(SAME), b=View(SAME)) == []


def test_a_node_that_is_silent_is_not_refused() -> None:
    assert _told(a=View(SAME), b=Silent("no answer after 60 s")) == []


def test_all_problems_at_once() -> None:
    told = "\n".join(
        _told(
            a=View(SAME),
            b=View({**SAME, "peft": "2"}, "GLOO_SOCKET_IFNAME = eth9: there is no such network interface"),
            c=View(SAME, None, "does not see what another node wrote there"),
            d=Silent(NOT_INSTALLED),
        )
    )
    for words in (
        "  peft: 2 on b, 1 on other nodes",
        "on b: GLOO_SOCKET_IFNAME = eth9",
        "run.storage = /runs",
        "  c does not see",
        "not installed on d",
    ):
        assert words in told


def test_what_is_built_in_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in our images."""
    (tmp_path / "deepspeed" / "ops" / "adam").mkdir(parents=True)
    (tmp_path / "deepspeed" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    assert checks.check_compiler().status == "warn"
    (tmp_path / "deepspeed" / "ops" / "adam" / "cpu_adam_op.cpython-311-x86_64-linux-gnu.so").touch()
    for found in (checks.check_compiler(), checks.check_cuda_toolkit({})):
        assert (found.status, found.found) == ("ok", checks.BUILT_IN)
