"""What all tests share: quiet libraries, tiny models built once, and one real local Ray for the whole session."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.head import Head, free_port, ray_head
from tests.helpers import Run

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="raytune-hf-")  # nobody else's cache decides a test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy sizes gain nothing from threads, and wait for each other
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # not 2: how late an end is seen
os.environ.setdefault("RAY_metrics_report_interval_ms", "2000")  # a test waits for it
# The S3 of `s3_bucket`, and nobody's own. Ray's workers have it from the environment in which Ray starts.
S3_PORT = free_port()
os.environ |= {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

TEXTS = (
    "What does this word mean? It means that somebody asked a question and wants a short answer.",
    "How many days has a week? Seven, and 24 hours each, that is 168 hours or 10080 minutes.",
    "今天天气很好，我们去公园散步。你想喝茶还是喝咖啡？",
    "名词解释：适配器是一小组可以单独训练的参数。",
    "First pack the long documents, then the short ones; 3.14159 is not a whole number.",
) * 8


def pytest_collection_finish() -> None:
    """What was imported stays: whoever collects garbage to give memory back need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each tiny architecture."""
    from raytune_ds.model import tiny

    root = tmp_path_factory.mktemp("tiny-models")
    return {name: tiny.build(name, lambda: TEXTS, 0, root / name) for name in tiny.ARCHITECTURES}


@pytest.fixture(scope="session")
def hub_model(tiny_models: dict[str, Path]) -> str:
    """The name of a model of the hub, in its cache as if it had been downloaded."""
    folder, commit = Path(os.environ["HF_HOME"], "hub", "models--org--tiny"), "c0" * 20
    shutil.copytree(tiny_models["qwen2"], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return "org/tiny"


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_models: dict[str, Path]) -> Any:
    """The tokenizer that the tiny models share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models["qwen2"])


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Something that is reached by a URI only, so that nothing may go around pyarrow; it lies at tmp_path/bucket."""
    import pyarrow.fs as pafs

    from raytune_ds import storage

    root = tmp_path / "bucket"
    root.mkdir()
    store = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
    local = storage.open_filesystem

    def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
        inside = path.removeprefix("mem://")
        return (store, inside.rstrip("/")) if inside != path else local(path)

    monkeypatch.setattr(storage, "open_filesystem", open_filesystem)
    return "mem://runs"


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """The URI of a bucket of an S3 that moto plays, in this process."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or a line a request
    server = ThreadedMotoServer("127.0.0.1", S3_PORT, verbose=False)
    server.start()
    boto3.client("s3").create_bucket(Bucket="raytune-tests")
    yield "s3://raytune-tests"
    server.stop()


NUM_CPUS = 4  # logical: three workers fit, whatever the machine has


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once: a start costs seconds, and its worker processes stay warm between tests."""
    import ray

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


TOKEN = "5a" * 32


@pytest.fixture(scope="module")
def token_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray head that wants TOKEN; those who belong to it have it where Ray looks for it, in a home of their own.

    No longer than it is needed: what Ray Train leaves behind to clean up after dead runs does nothing as long as there
    is more than one Ray on a machine.
    """
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    with ray_head({"HOME": str(home), "RAY_AUTH_MODE": "token"}) as head:
        yield head


@pytest.fixture
def run(ray_session: None, tmp_path: Path) -> Run:
    """Launches a run from overrides, with its storage in the test's own folder; returns the Result."""
    from raytune_ds.compose import compose
    from raytune_ds.launch import launch

    def start(*overrides: str, storage: Path = tmp_path) -> Any:
        return launch(compose([], [f"run.storage={storage}", "tracking.to=[]", *overrides]))

    return start
