"""The machines that the other tests stand on: apart from each other and from this one, and gone without a trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.nodes import SHARED, mounts_below, new_world, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("machines"), pytest.mark.timeout(120)]

_MAKER = """
import time
from tests.cluster.nodes import new_world
with new_world() as world:
    print(world.folder, world.add("n1", "10.99.2.1").pid, flush=True)
    time.sleep(600)
"""


def test_machines_share_a_folder_and_nothing_else() -> None:
    """Homes, /tmp, names and links are their own; a pulled cable is felt."""
    interfaces = set(psutil.net_if_addrs())
    with new_world() as world:
        one, two = world.add("one", "10.99.2.1"), world.add("two", "10.99.2.2")
        marks = ("/tmp/of-one", str(Path.home() / "of-one"), f"{SHARED}/of-one")
        one.run("touch", *marks)
        assert [two.run("test", "-e", mark, check=False).returncode for mark in marks] == [1, 1, 0]
        assert not any(Path(mark).exists() for mark in marks)
        assert (world.shared / "of-one").exists()
        assert two.run("hostname").stdout == "two\n"
        reach = ("ssh", "-i", world.key, "-o", "StrictHostKeyChecking=no", "-o", "ConnectTimeout=2")
        assert one.run(*reach, f"root@{two.address}", "hostname").stdout == "two\n"
        two.cut()
        assert one.run(*reach, f"root@{two.address}", "hostname", check=False).returncode != 0
        two.mend()
        assert one.run(*reach, f"root@{two.address}", "hostname").stdout == "two\n"
        assert set(psutil.net_if_addrs()) == interfaces
    assert not world.folder.exists()


def test_they_die_with_their_maker() -> None:
    """Even if it is killed: no process and no mount stays."""
    maker = subprocess.Popen(
        [sys.executable, "-c", _MAKER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert maker.stdout is not None
    folder, pid = maker.stdout.readline().split()
    assert psutil.pid_exists(int(pid))
    maker.kill()
    maker.wait()
    wait_until("its machine is gone", lambda: not psutil.pid_exists(int(pid)), 20)
    assert not mounts_below(Path(folder))
    shutil.rmtree(folder)
