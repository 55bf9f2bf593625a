"""Paths to files: what is found, what is refused and what the refusal says."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pyarrow import fs

from raytune_ds import hub, storage
from raytune_ds.data.readers import read_rows
from raytune_ds.data.sources import SourceFile, expand
from raytune_ds.errors import UserError


def write(path: Path, content: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        expand(path)
    return str(caught.value)


def names(path: str) -> list[str]:
    return [Path(file.path).name for file in expand(path)]


@pytest.fixture
def asked(monkeypatch):
    """The datasets that the Hub is asked for; it knows those of 'org' only."""
    asked: list[str] = []

    def check(name: str) -> None:
        asked.append(name)
        if not name.startswith("org/"):
            raise UserError("the Hub says no")

    monkeypatch.setattr(hub, "check_dataset", check)
    return asked


def test_a_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "{}")
    assert expand(path) == [SourceFile(path, "jsonl", 2)]
    assert expand(f"file://{path}") == [SourceFile(path, "jsonl", 2)]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand("~/a.jsonl") == expand("a.jsonl") == expand("*.jsonl") == expand(path)


@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("a.JSON", "json"),
        ("a.ndjson", "jsonl"),
        ("a.csv.gz", "csv"),
        ("a.txt", "txt"),
        ("a.parquet", "parquet"),
    ],
)
def test_containers(tmp_path, name, container):
    assert expand(write(tmp_path / name, "x"))[0].container == container


def test_a_folder(tmp_path):
    for name in ("b.jsonl", "a.json", "README.txt", "LICENSE", "_SUCCESS.txt", ".hidden.json", "sub/c.json"):
        write(tmp_path / name, "{}")
    assert names(str(tmp_path)) == ["a.json", "b.jsonl"]


def test_globs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.md", "x/d.jsonl", "x/y/e.jsonl", "x/.f.jsonl"):
        write(tmp_path / name, "{}")
    assert names(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/[ac].*") == ["a.jsonl"]
    assert names(f"{tmp_path}/?/*.jsonl") == ["d.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "d.jsonl", "e.jsonl"]
    write(tmp_path / "odd[1].json", "{}")
    assert names(f"{tmp_path}/odd[1].json") == ["odd[1].json"]


def test_refused_paths(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    assert refusal(f"{tmp_path}/train.json").endswith(f"no such file or folder; {tmp_path} has train.jsonl")
    assert f"nor anything of a similar name in {tmp_path}" in refusal(f"{tmp_path}/zzz")
    assert "no such file" in refusal(f"{tmp_path}/nodir/train.json")
    assert "can't be opened" in refusal("~nobody-of-this-name/x.json")
    assert "empty (0 bytes)" in refusal(write(tmp_path / "e.json", ""))
    told = refusal(write(tmp_path / "t.xlsx", "x"))
    assert "unknown extension '.xlsx'; known are .json, .jsonl" in told
    assert refusal(f"{tmp_path}/*.xlsx") == told
    assert f"no file matches; {tmp_path} has e.json, t.xlsx, train.jsonl" in refusal(f"{tmp_path}/*.parquet")
    assert f"{tmp_path}/nodir has nothing" in refusal(f"{tmp_path}/nodir/*.json")


def test_refused_folders(tmp_path):
    (tmp_path / "void").mkdir()
    assert "no data file directly in this folder, which has nothing" in refusal(str(tmp_path / "void"))
    told = refusal(str(tmp_path))
    assert "which has void" in told
    assert f"{tmp_path}/**/*.jsonl" in told


def test_refused_uris():
    assert refusal("https://a/b.json").startswith(
        "https://a/b.json: can't be opened: Unrecognized filesystem"
    )


def test_remote_files_get_uris_that_can_be_opened(tmp_path, monkeypatch):
    """A folder stands in for any remote filesystem: globs, folders and names work through pyarrow alone."""
    write(tmp_path / "bucket/data/a b%é.jsonl", '{"x": 1}')
    write(tmp_path / "bucket/data/c.jsonl", "{}")

    class Remote:
        @staticmethod
        def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
            parts = urlsplit(uri)
            assert uri.isascii()
            assert " " not in uri
            return fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), parts.netloc + unquote(
                parts.path
            )

    monkeypatch.setattr(storage.pafs, "FileSystem", Remote)
    first, second = expand("s3://bucket/data/*.jsonl?region=eu")
    assert first.path == "s3://bucket/data/a%20b%25%C3%A9.jsonl?region=eu"
    assert second.path == "s3://bucket/data/c.jsonl?region=eu"
    assert [row.value for row in read_rows(first)] == [{"x": 1}]
    assert expand(first.path) == expand("s3://bucket/data/a b%25é.jsonl?region=eu") == [first]
    assert [file.path for file in expand("s3://bucket/data/")] == [
        "s3://bucket/data/a%20b%25%C3%A9.jsonl",
        "s3://bucket/data/c.jsonl",
    ]
    assert "s3://bucket/data has c.jsonl" in refusal("s3://bucket/data/d.jsonl")


@pytest.mark.parametrize("name", ["org/name", "org/Name_v2-2.5"])
def test_a_hub_name(name, asked):
    assert expand(name) == [SourceFile(name, "hub", 0)]
    assert asked == [name]


def test_what_looks_like_a_file_is_not_looked_for_on_the_hub(asked):
    for path in ("./train", "~/train-xyz", "a/b/c", "data/train.jsonl", "train.xlsx", "org/", " "):
        assert "no such file" in refusal(path)
    assert asked == []


def test_a_missing_folder_names_its_neighbours_beside_the_hub(tmp_path, asked, monkeypatch):
    write(tmp_path / "medical/x.json", "{}")
    monkeypatch.chdir(tmp_path)
    assert refusal("medicall") == (
        f"medicall: no such file or folder; {tmp_path} has medical. As a dataset of the Hub: the Hub says no"
    )
