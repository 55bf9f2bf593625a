"""Data in a bucket, and the store too: read, prepared and read back as if all of it were on this machine."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ds import storage
from raytune_ds.data.readers import read_rows
from raytune_ds.data.sources import expand
from raytune_ds.data.store import SPLITS, read_table
from raytune_ds.errors import UserError

ROWS = [
    {"instruction": f"question {i} " + "word " * (i % 50), "output": f"answer {i} " + "text " * (i * 7 % 50)}
    for i in range(6_000)
]
GLOBS = ("*.json", "shards/**/*.parquet", "*.jsonl.gz")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, s3_bucket: str) -> tuple[Path, str]:
    """ROWS as an array, in shards of Parquet and as compressed lines: in a folder, and the same in the bucket."""
    folder = tmp_path_factory.mktemp("data")
    thirds = [ROWS[:2_000], ROWS[2_000:4_000], ROWS[4_000:]]
    (folder / "array.json").write_text(json.dumps(thirds[0], indent=1), encoding="utf-8")
    for name, rows in (("a/0 of 2.parquet", thirds[1][:1_500]), ("b/1 of 2.parquet", thirds[1][1_500:])):
        (folder / "shards" / name).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "shards" / name, row_group_size=400)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, thirds[2])).encode()))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        storage.write_bytes(
            f"{s3_bucket}/data/{file.relative_to(folder)}".replace(" ", "%20"), file.read_bytes()
        )
    return folder, f"{s3_bucket}/data"


def rows_of(path: str) -> list[Any]:
    rows = [row for file in expand(path) for row in read_rows(file)]
    assert [row.error for row in rows if row.error] == []
    return [row.value for row in rows]


def test_files_of_a_bucket(data: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by globs and by folder, whether the environment or the URI says where the bucket is."""
    _, bucket = data
    where = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    for query in ("", f"?region=us-east-1&scheme={where.scheme}&endpoint_override={where.netloc}"):
        if query:
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody is
        assert [row for glob in GLOBS for row in rows_of(f"{bucket}/{glob}{query}")] == ROWS
        assert rows_of(f"{bucket}{query}") == ROWS[:2_000] + ROWS[4_000:]
        shards = [file.path for file in expand(f"{bucket}/{GLOBS[1]}{query}")]
        assert shards == [f"{bucket}/shards/{name}%20of%202.parquet{query}" for name in ("a/0", "b/1")]


def test_what_a_bucket_has_not(data: tuple[Path, str]) -> None:
    """A refusal names what is near, or says that there is no such bucket."""
    _, bucket = data
    with pytest.raises(UserError, match=r"no such file or folder; .*/data has array\.json"):
        expand(f"{bucket}/array.jsn")
    with pytest.raises(
        UserError, match=r"no file matches; .*/data has array\.json, lines\.jsonl\.gz, shards"
    ):
        expand(f"{bucket}/*.csv")
    with pytest.raises(UserError, match="s3://no-such-bucket"):
        expand("s3://no-such-bucket/x.json")


@pytest.mark.usefixtures("ray_session")
def test_a_store_in_a_bucket(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    data: tuple[Path, str],
    s3_bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Made of what lies in the bucket, into the bucket, in several buckets of our own: the packs that a folder gets."""
    folder, bucket = data
    here = prepared(str(tmp_path), str(folder), tiny_models["qwen2"])
    there = prepared(f"{s3_bucket}/runs", bucket, tiny_models["qwen2"])
    assert there.path.startswith(f"{s3_bucket}/runs/.prepared/")
    assert there.manifest.num_rows == len(ROWS)
    assert len(here.manifest.train.shards) > 1
    for split in SPLITS:
        packs = packs_of(here, split)
        assert list(there.split(split).sources.values()) == list(here.split(split).sources.values())
        assert replace(there.split(split), sources={}) == replace(here.split(split), sources={})
        assert packs_of(there, split) == packs
        assert packs.num_rows == here.split(split).num_packs > 0
    assert not [name for name in storage.list_names(f"{s3_bucket}/runs/.prepared") if "scratch" in name]
    capsys.readouterr()
    assert prepared(f"{s3_bucket}/runs", bucket, tiny_models["qwen2"]) == there
    assert "prepared before" in capsys.readouterr().out


def prepared(root: str, data: str, model: Path) -> Any:
    from raytune_ds.check import check
    from raytune_ds.compose import compose
    from raytune_ds.launch import assign

    sources = ", ".join(f"{data}/{glob}" for glob in GLOBS)
    settings = ("data.seq_len=256", "data.eval.fraction=0.05", "data.prepare_memory_mib=1")
    config = compose(
        [], [f"run.storage={root}", f"model.name={model}", f"data.sources=[{sources}]", *settings]
    )
    return assign(check(config)).store


def packs_of(store: Any, split: str) -> pa.Table:
    return pa.concat_tables(read_table(f"{store.path}/{name}") for name, _ in store.split(split).shards)
