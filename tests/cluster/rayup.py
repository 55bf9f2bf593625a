"""`ray up` of a rendered file, run from one machine for others; `ray job submit`; `ray down`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ds.compose import compose
from raytune_ds.deploy.render import render
from tests.cluster.nodes import Machine, wait_until

NODES_S = 180
_NODES = "import json, ray; ray.init('auto', logging_level='ERROR'); print(json.dumps(ray.nodes()))"


def rendered(target: str, *overrides: str) -> str:
    """The file that `raytune-ds render` makes for a target."""
    return render(compose([], list(overrides)), target)[0]


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Attributes:
        desk: where its user sits.
        file: of `ray up`.
        up_s: seconds that `ray up` took.
    """

    desk: Machine
    head: Machine
    file: Path
    up_s: float

    def nodes(self) -> list[dict[str, Any]]:
        """What Ray says of its nodes that are alive."""
        done = self.head.run("python", "-c", _NODES, RAY_AUTH_MODE="token", check=False)
        answers = [line for line in done.stdout.splitlines() if line.startswith("[{")]
        return [node for node in json.loads(answers[0]) if node["Alive"]] if answers else []

    def wait_for_nodes(self, number: int) -> float:
        """Waits for so many, the head included; returns the seconds it took."""
        return wait_until(f"{number} nodes are up", lambda: len(self.nodes()) == number, NODES_S)

    def submit(
        self, folder: Path, log: Path, *arguments: str, options: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Starts `ray job submit` of a training, with its output in `log`; `options` are for Ray."""
        return self.desk.start(
            *("ray", "job", "submit", "--working-dir", folder, *options, "--"),
            *("python", "-m", "raytune_ds.train", *arguments),
            log=log,
            RAY_AUTH_MODE="token",
            RAY_ADDRESS=f"http://{self.head.address}:8265",
        )


@contextlib.contextmanager
def ray_up(desk: Machine, head: Machine, file: Path, **env: str) -> Iterator[Cluster]:
    """Brings a cluster up, with a token as its file says; and down."""
    desk.run("ray", "get-auth-token", "--generate")
    started = time.monotonic()
    desk.run("ray", "up", "--yes", "--no-config-cache", file, timeout_s=300, **env)
    yield Cluster(desk, head, file, time.monotonic() - started)
    desk.run("ray", "down", "--yes", file, timeout_s=120, **env)
