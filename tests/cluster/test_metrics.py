"""A running job, scraped by a real Prometheus with the config that Ray writes: the dashboard has something to show."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.head import TOKENS_OFF, Head, free_port, ray_head, wait_for_port
from tests.helpers import queries

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed: apt-get install prometheus"
    ),
]

DEADLINE_S = 240
# These have something to say of GPUs alone; that they are named right is a test in tests/unit/test_metrics.py.
NEEDS_GPU = re.compile(r"ray_node_gpu|ray_node_gram|mfu_ratio")


@contextlib.contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[str]:
    """Its address."""
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(command)
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def training(head: Head, storage: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that goes on until it is interrupted."""
    settings = ["run.name=watched", f"run.storage={storage}", "train.max_steps=100000", "data.seq_len=256"]
    settings += ["train.global_batch=4", "train.eval_steps=20", "checkpoint.every_steps=10"]
    command = [sys.executable, "-m", "raytune_ds.train", *settings]
    process = subprocess.Popen(command, env=head.environment | {"RAY_ADDRESS": head.address})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answer(prometheus: str, query: str) -> list[Any]:
    """What Prometheus says now."""
    filled = query.replace("$run", "watched").replace("$session", ".+")
    parameters = urllib.parse.urlencode({"query": filled})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{parameters}", timeout=10) as response:
        return list(json.load(response)["data"]["result"])


def test_every_query_of_the_dashboard_is_answered(tmp_path: Path) -> None:
    """While the run goes on; once it has ended, it is gone."""
    with ray_head(TOKENS_OFF) as head:
        config = head.folder / "session_latest/metrics/prometheus/prometheus.yml"
        with prometheus(config, tmp_path / "prometheus") as url:
            with training(head, tmp_path / "runs") as run:
                expected = {q for q in queries() if torch.cuda.is_available() or not NEEDS_GPU.search(q)}
                open_questions = set(expected)
                end = time.monotonic() + DEADLINE_S
                while open_questions and time.monotonic() < end and run.poll() is None:
                    open_questions = {query for query in expected if not answer(url, query)}
                    time.sleep(1)
                assert open_questions == set()
                assert len(expected) > 25
            end = time.monotonic() + DEADLINE_S
            while left := answer(url, 'ray_raytune_ds_step{run="$run"}'):
                assert time.monotonic() < end, left
                time.sleep(1)
