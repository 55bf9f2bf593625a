"""A store is the same to the byte however it came about, and several jobs that ask for it make it once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raytune_ds import storage
from raytune_ds.data import tasks
from raytune_ds.data.order import Place
from raytune_ds.data.store import FILE_SHIFT, Store
from tests.helpers import write_jsonl

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 5_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name two sources, one of them in two files, of a dozen chunks and two buckets."""
    folder = tmp_path_factory.mktemp("rows")
    for number in range(3):
        rows = [
            {"instruction": f"question {i} of {number}?", "output": f"answer {i} " + "text " * (i * 7 % 40)}
            for i in range(ROWS)
        ]
        write_jsonl(folder / f"{'law' if number else 'chat'}-{number}.jsonl", rows)
    law = f"{{path: '{folder}/law-*.jsonl', name: law, weight: 1, epochs: 2}}"
    return [
        f"data.sources=[{law}, {{path: {folder}/chat-0.jsonl, weight: 3, epochs: 1.5}}]",
        "data.prepare_memory_mib=1",
        "data.seq_len=256",
    ]


@pytest.fixture(scope="module")
def tiny(tiny_models: dict[str, Path]) -> Path:
    """Any tiny model: only its tokenizer counts here."""
    return tiny_models["qwen2"]


def prepared(storage: Path, tiny: Path, data: list[str]) -> Any:
    """The store below `storage`."""
    from raytune_ds.check import check
    from raytune_ds.compose import compose
    from raytune_ds.launch import assign

    return assign(check(compose([], [f"run.storage={storage}", f"model.name={tiny}", *data]))).store


def content(store: Any) -> dict[str, bytes]:
    """All files of a store but the one that says how long it took, and the page, which says what it was made by."""
    files = {path.name: path.read_bytes() for path in Path(store.path).iterdir()}
    files.pop("data.html", None)
    assert json.loads(files.pop("making.json"))["seconds"] > 0
    return files


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny: Path, data: list[str], ray_session: None) -> Any:
    """The store as it is made when nothing happens."""
    return prepared(tmp_path_factory.mktemp("calm"), tiny, data)


@pytest.mark.parametrize(
    ("at_once", "workers_a_reader"), [(1, 8), (2, 1), pytest.param(2, 8, marks=pytest.mark.slow)]
)
def test_the_number_of_tasks_does_not_matter(
    tmp_path: Path,
    tiny: Path,
    data: list[str],
    calm: Any,
    at_once: int,
    workers_a_reader: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor whether tasks read, or who asks."""
    monkeypatch.setattr(tasks, "_AHEAD", 1)
    monkeypatch.setattr(tasks, "_WORKERS_A_READER", workers_a_reader)
    monkeypatch.setattr(tasks, "num_cpus", lambda: at_once)
    assert content(prepared(tmp_path, tiny, data)) == content(calm)


def test_what_was_killed_half_way_goes_on_and_comes_out_the_same(
    tmp_path: Path,
    tiny: Path,
    data: list[str],
    calm: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks that were done are not done again, and nothing of the work is left behind."""
    name = Path(calm.path).name
    chunks = tmp_path / ".prepared" / f".making-{name}" / "chunks"
    with started(tmp_path, tiny, data) as process:
        while len(list(chunks.glob("0*"))) < 2:
            assert process.poll() is None
            threading.Event().wait(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / ".prepared" / name / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in chunks.glob("0*")}
    after: dict[Path, int] = {}
    delete = storage.delete_dir

    def look_and_delete(path: str) -> None:
        after.update({path: path.stat().st_mtime_ns for path in chunks.glob("0*")})
        delete(path)

    monkeypatch.setattr(storage, "delete_dir", look_and_delete)
    store = prepared(tmp_path, tiny, data)
    assert "of its chunks are done" in capsys.readouterr().out
    assert len(after) > len(done)
    assert done.items() <= after.items()
    assert content(store) == content(calm)
    assert [path.name for path in (tmp_path / ".prepared").iterdir()] == [name]


def test_of_several_jobs_one_makes_the_store_and_the_others_wait(
    tmp_path: Path, tiny: Path, data: list[str], calm: Any
) -> None:
    processes = [started(tmp_path, tiny, data) for _ in range(2)]
    said = []
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        said.append(out.decode())
    assert sorted("prepared before" in text for text in said) == [False, True]
    assert all(f"/{Path(calm.path).name}/data.html" in text for text in said)
    assert content(Store.find(f"{tmp_path}/.prepared/{Path(calm.path).name}")) == content(calm)


def started(folder: Path, tiny: Path, data: list[str]) -> subprocess.Popen[bytes]:
    """The command line, on our own Ray."""
    import ray

    command = [
        sys.executable,
        "-m",
        "raytune_ds",
        "data",
        f"run.storage={folder}",
        f"model.name={tiny}",
        *data,
    ]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_the_mixture_is_exact(calm: Any) -> None:
    """Law's rows may come twice and those of the chat once and a half, at one to three; all but those held out."""
    held_out = {name: part.num_docs for name, part in calm.manifest.eval.sources.items()}
    assert all(0 < count < 0.05 * 2 * ROWS for count in held_out.values())
    law, chat = 2 * ROWS - held_out["law"], ROWS - held_out["chat-0"]
    scale = min(2 * law, 1.5 * chat / 3)
    wanted = {"law": round(scale), "chat-0": round(3 * scale)}
    assert {name: part.num_docs for name, part in calm.manifest.train.sources.items()} == wanted
    counted: Counter[int] = Counter()
    reader = calm.reader("train")
    for position in range(calm.manifest.train.num_packs):
        counted.update(reader.pack(Place(*divmod(position, calm.manifest.row_group)))["docs"].tolist())
    times = {name: Counter[int]() for name in wanted}
    for doc, count in counted.items():
        times[calm.manifest.sources[calm.manifest.file_sources[doc >> FILE_SHIFT]]][count] += 1
    assert sum(count * rows for count, rows in times["law"].items()) == wanted["law"]
    assert max(times["law"]) == 1  # there are more than enough
    assert set(times["chat-0"]) == {1, 2}
    assert sum(times["chat-0"].values()) == chat  # each of them, and half of them again
