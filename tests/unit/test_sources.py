"""Paths to files, and files to rows: what is read, what is refused and what the refusal says."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from raytune_ds.data import sources
from raytune_ds.data.sources import Row, SourceFile, expand, open_filesystem, read_rows
from raytune_ds.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(path: Path, content: str | bytes) -> list[Row]:
    (file,) = expand(write(path, content))
    rows = list(read_rows(file))
    assert [row.index for row in rows] == list(range(len(rows)))
    assert not any(row.fatal for row in rows[:-1])
    assert all((row.value is None) == (row.error is not None) for row in rows)
    return rows


def values(rows: list[Row]) -> list[Any]:
    assert [row.error for row in rows if row.error] == []
    return [row.value for row in rows]


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        expand(path)
    return str(caught.value)


def names(files: list[SourceFile]) -> list[str]:
    return [Path(file.path).name for file in files]


# ---- paths -----------------------------------------------------------------------------------------


def test_a_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "{}")
    assert expand(path) == [SourceFile(path, "jsonl", 2)]
    assert expand(f"file://{path}") == [SourceFile(path, "jsonl", 2)]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand("~/a.jsonl") == expand("a.jsonl") == expand(path)


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
    assert names(expand(str(tmp_path))) == ["a.json", "b.jsonl"]


def test_globs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.md", "x/d.jsonl", "x/y/e.jsonl", "x/.f.jsonl"):
        write(tmp_path / name, "{}")
    assert names(expand(f"{tmp_path}/*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert names(expand(f"{tmp_path}/[ac].*")) == ["a.jsonl"]
    assert names(expand(f"{tmp_path}/?/*.jsonl")) == ["d.jsonl"]
    assert names(expand(f"{tmp_path}/**/*.jsonl")) == ["a.jsonl", "b.jsonl", "d.jsonl", "e.jsonl"]
    assert names(expand(f"{tmp_path}/x/**")) == ["d.jsonl", "e.jsonl"]
    write(tmp_path / "odd[1].json", "{}")
    assert names(expand(f"{tmp_path}/odd[1].json")) == ["odd[1].json"]


def test_refused_paths(tmp_path):
    folder = str(tmp_path)
    write(tmp_path / "train.jsonl", "{}")
    missing = refusal(f"{folder}/train.json")
    assert "no such file" in missing
    assert "train.jsonl" in missing
    assert f"no folder {folder}/nodir" in refusal(f"{folder}/nodir/train.json")
    assert "nothing of a similar" not in missing
    assert "nor anything of a similar name" in refusal(f"{folder}/zzz")
    assert "empty" in refusal(" ")
    assert "empty (0 bytes)" in refusal(write(tmp_path / "e.json", ""))
    told = refusal(write(tmp_path / "t.xlsx", "x"))
    assert "unknown extension '.xlsx'" in told
    assert ".jsonl" in told
    assert "unknown extension '.xlsx'" in refusal(f"{folder}/*.xlsx")
    none = refusal(f"{folder}/*.parquet")
    assert "no file matches" in none
    assert "train.jsonl" in none
    assert "does not exist" in refusal(f"{folder}/nodir/*.json")


def test_refused_folders(tmp_path):
    (tmp_path / "void").mkdir()
    assert "the folder is empty" in refusal(str(tmp_path / "void"))
    assert "**/*.jsonl" in refusal(str(tmp_path))
    write(tmp_path / "void/notes.docx", "x")
    assert "only notes.docx" in refusal(str(tmp_path / "void"))


def test_refused_uris():
    with pytest.raises(UserError, match=r"https://a/b\.json: can't be opened.*s3://"):
        open_filesystem("https://a/b.json")
    with pytest.raises(UserError, match="must not hold credentials") as caught:
        open_filesystem("s3://key:hunter2@bucket/x.json")
    assert "hunter2" not in str(caught.value)


def test_remote_files_keep_their_uri(tmp_path, monkeypatch):
    """A bucket stands in for any remote filesystem: globs, folders and names work through pyarrow alone."""
    write(tmp_path / "bucket/data/a b%.jsonl", '{"x": 1}')
    write(tmp_path / "bucket/data/c.jsonl", "{}")
    asked = []

    class Remote:
        @staticmethod
        def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
            asked.append(uri)
            return fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "bucket"

    monkeypatch.setattr(sources.fs, "FileSystem", Remote)
    files = expand("s3://bucket/data/*.jsonl?region=eu")
    assert [file.path for file in files] == [
        "s3://bucket/data/a b%.jsonl?region=eu",
        "s3://bucket/data/c.jsonl?region=eu",
    ]
    assert set(asked) == {"s3://bucket?region=eu"}
    assert values(list(read_rows(files[0]))) == [{"x": 1}]
    assert [file.path for file in expand("s3://bucket/data/")] == [
        "s3://bucket/data/a b%.jsonl",
        "s3://bucket/data/c.jsonl",
    ]
    assert "s3://bucket/data has c.jsonl" in refusal("s3://bucket/data/d.jsonl")


# ---- the Hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Sets what the Hub answers: an exception, or nothing."""
    import huggingface_hub

    def answer(error: Exception | None) -> None:
        def dataset_info(self: Any, name: str, timeout: float) -> None:
            assert timeout <= 10
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)

    return answer


def http_error(kind: str) -> Exception:
    from huggingface_hub import errors

    of_kind = getattr(errors, kind)
    error = of_kind.__new__(of_kind)  # their constructors ask for a response
    error.args = ("the server said 401",)
    return error


@pytest.mark.parametrize("name", ["squad", "org/name", "org/Name_v2-2.5"])
def test_a_hub_name(name, hub):
    hub(None)
    assert expand(name) == [SourceFile(name, "hub", 0)]


def test_what_looks_like_a_file_is_not_looked_for_on_the_hub(hub):
    hub(AssertionError("the Hub was asked"))
    for path in ("./train", "~/train-xyz", "a/b/c", "data/train.jsonl", "train.xlsx", "org/"):
        assert "no such file" in refusal(path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Name or service not known"), ["can't be reached", "Name or service", "network"]),
        (http_error("RepositoryNotFoundError"), ["there is no 'org/name'", "private", "HF_TOKEN"]),
        (http_error("GatedRepoError"), ["gated", "accept its terms"]),
        (http_error("OfflineModeIsEnabled"), ["HF_HUB_OFFLINE"]),
        (http_error("HfHubHTTPError"), ["did not serve", "401"]),
    ],
)
def test_hub_refusals(error, words, hub):
    hub(error)
    told = refusal("org/name")
    assert told.startswith("org/name: no such file or folder")
    assert [word for word in words if word not in told] == [], told


def test_a_missing_folder_names_its_neighbours_beside_the_hub(tmp_path, hub, monkeypatch):
    write(tmp_path / "medical/x.json", "{}")
    monkeypatch.chdir(tmp_path)
    hub(ConnectionError())
    assert "here are medical" in refusal("medicall")


def test_hub_rows(hub, monkeypatch):
    hub(None)
    import datasets

    def load_dataset(name: str, split: str, streaming: bool) -> Iterator[dict]:
        assert (name, split, streaming) == ("org/name", "train", True)
        yield {"text": "a"}
        raise ValueError("Bad split: train. Available splits: ['test']\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(SourceFile("org/name", "hub", 0))
    assert next(rows) == Row(0, None, {"text": "a"}, None)
    with pytest.raises(UserError, match=r"'org/name'.*'train'.*Available splits: \['test'\]"):
        next(rows)


# ---- JSON lines, text ------------------------------------------------------------------------------


def test_jsonl(tmp_path):
    content = '\ufeff{"a": 1}\r\n\n  {"a": NaN}\n{"a": }\n[1]\n3\n{"a": "é"}'
    rows = rows_of(tmp_path / "a.jsonl", content)
    assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7]
    assert rows[0].value == {"a": 1}
    assert "malformed JSON at line 4, column 7: Expecting value" in str(rows[2].error)
    assert rows[3].error == "the row is a list, expected an object"
    assert rows[4].error == "the row is a number, expected an object"
    assert rows[5].value == {"a": "é"}
    assert not any(row.fatal for row in rows)


def test_jsonl_that_is_an_array(tmp_path):
    assert "name the file .json" in str(rows_of(tmp_path / "a.jsonl", '[\n{"a": 1}\n]')[0].error)


def test_jsonl_oddities(tmp_path):
    rows = rows_of(tmp_path / "a.jsonl", "9" * 5000 + "\n" + "[" * 200_000 + '\n{"a": 1}')
    assert "line 1" in str(rows[0].error)
    assert "line 2" in str(rows[1].error)
    assert rows[2].value == {"a": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_that_is_not_utf8_costs_one_row(tmp_path, name):
    rows = rows_of(tmp_path / name, b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 2}\n')
    assert [row.error is None for row in rows] == [True, False, True]
    told = str(rows[1].error)
    assert "not valid UTF-8 at line 2: byte 0xe9" in told
    assert f"iconv -f ENCODING -t UTF-8 {name}" in told


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_other_unicode_encodings(tmp_path, name, encoding):
    (row,) = rows_of(tmp_path / name, '[{"a": 1}]'.encode(encoding))
    assert row.fatal
    assert f"{name} looks like {encoding}" in str(row.error)
    assert f"iconv -f {encoding} -t UTF-8 {name}" in str(row.error)


def test_git_lfs_pointer(tmp_path):
    (row,) = rows_of(tmp_path / "a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert row.fatal
    assert "git lfs pull" in str(row.error)


def test_txt(tmp_path):
    rows = rows_of(tmp_path / "a.txt", "\ufeff one \n\n \t\ntwo\u2028more\r\n")
    assert values(rows) == [{"text": " one "}, {"text": "two\u2028more"}]
    assert [row.line for row in rows] == [1, 4]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW", 1 << 20)
    (row,) = rows_of(tmp_path / "a.jsonl", '{"a": "' + "x" * (2 << 20) + '"}\n{}')
    assert row.fatal
    assert "line 1 is longer than 1 MiB" in str(row.error)


def test_compressed(tmp_path):
    data = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(100_000)))
    assert len(values(rows_of(tmp_path / "a.jsonl.gz", data))) == 100_000
    last = rows_of(tmp_path / "b.jsonl.gz", data[: len(data) // 2])[-1]
    assert last.fatal
    assert "can't be read from here on" in str(last.error)


# ---- CSV, Parquet ----------------------------------------------------------------------------------


def test_csv(tmp_path):
    content = '\ufeffa,b\n1,"two\nlines"\n\n1\n1,2,3\n"x"y,2\n,é\n'
    rows = rows_of(tmp_path / "a.csv", content)
    assert [row.line for row in rows] == [2, 5, 6, 7, 8]
    assert rows[0].value == {"a": "1", "b": "two\nlines"}
    assert "line 5 has 1 cells, the header has 2" in str(rows[1].error)
    assert "line 6 has 3 cells" in str(rows[2].error)
    assert "malformed CSV at line 7" in str(rows[3].error)
    assert rows[4].value == {"a": "", "b": "é"}


def test_csv_that_is_not_utf8(tmp_path):
    rows = rows_of(tmp_path / "a.csv", b"a\ncaf\xe9\nx\n")
    assert "not valid UTF-8 at line 2: byte 0xe9" in str(rows[0].error)
    assert rows[1].value == {"a": "x"}
    (header,) = rows_of(tmp_path / "b.csv", b"caf\xe9\nx\n")
    assert header.fatal


def test_csv_headers(tmp_path):
    assert rows_of(tmp_path / "a.csv", "a,b\n") == []
    (twice,) = rows_of(tmp_path / "b.csv", "a,b,a\n1,2,3\n")
    assert twice.fatal
    assert "column 'a' twice" in str(twice.error)
    (none,) = rows_of(tmp_path / "c.csv", "\n\n")
    assert none.fatal
    assert "no header" in str(none.error)


@pytest.mark.parametrize("limit", [64 << 20, 1 << 20])
def test_csv_quote_that_is_never_closed(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW", limit)
    rows = rows_of(tmp_path / "a.csv", 'a,b\n1,2\n3,"x\n' + "1,2\n" * 500_000)
    assert len(rows) == 2
    assert rows[1].line == 3
    assert rows[1].fatal
    assert "never closed" in str(rows[1].error)


def test_long_csv_cells(tmp_path):
    assert values(rows_of(tmp_path / "a.csv", "a\n" + "x" * 300_000))[0]["a"] == "x" * 300_000


def test_parquet(tmp_path):
    table = [{"text": f"t{i}", "m": [{"role": "user", "name": None}]} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=300)
    rows = list(read_rows(expand(str(tmp_path / "a.parquet"))[0]))
    assert values(rows) == table
    assert rows[999].index == 999
    assert rows[999].line is None


def test_bad_parquet(tmp_path):
    (row,) = rows_of(tmp_path / "a.parquet", "no parquet at all")
    assert row.fatal
    assert "Parquet" in str(row.error)
    raw = pa.array([b"ok", b"\xff", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "b.parquet")
    rows = list(read_rows(expand(str(tmp_path / "b.parquet"))[0]))
    assert [row.value for row in rows] == [{"text": "ok"}, None, {"text": "fine"}]
    assert "0xff" in str(rows[1].error)
    assert not rows[1].fatal


# ---- JSON arrays -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Cuts everywhere: each read brings a few bytes."""

    def cut(size: int) -> None:
        monkeypatch.setattr(sources, "_CHUNK", size)

    return cut


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), max_size=5),
    indent=st.sampled_from([None, 0, 1, 4, "\t"]),
    ascii_only=st.booleans(),
    chunk=st.integers(48, 400),
)
def test_an_array_reads_back_equal(tmp_path_factory, rows, indent, ascii_only, chunk):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path_factory.getbasetemp() / "roundtrip.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)
        assert values(rows_of(path, text)) == rows


@pytest.mark.parametrize("chunk", range(2, 40))
def test_values_cut_anywhere(tmp_path, chunk, tiny_chunks):
    tiny_chunks(chunk)
    text = ' [{"a": -1.25e-7, "b": "x\\ud83d\\ude00\\n é漢😀"} ,\n {"c": [true, null, -Infinity]}, 12345, {}\n]\n '
    rows = rows_of(tmp_path / "a.json", text)
    assert rows[0].value == {"a": -1.25e-7, "b": "x😀\n é漢😀"}
    assert rows[1].value == {"c": [True, None, float("-inf")]}
    assert rows[2].error == "the row is a number, expected an object"
    assert rows[3].value == {}
    assert [row.line for row in rows] == [1, 2, 2, 2]


def test_exact_line_of_an_error_deep_inside(tmp_path):
    rows = [{"n": i, "text": "é" * 150} for i in range(20_000)]
    lines = json.dumps(rows, indent=1, ensure_ascii=False).split("\n")
    wrong = next(i for i, line in enumerate(lines) if '"n": 17000,' in line)
    lines[wrong] = lines[wrong].replace(",", "")
    found = rows_of(tmp_path / "a.json", "\n".join(lines))
    assert len(found) == 17_001
    # the comma is missed where the next line's key begins
    assert f"malformed JSON at line {wrong + 2}, column 3: Expecting ',' delimiter" == found[-1].error
    assert found[-1].line == wrong  # its opening brace: the line before, 1-based
    assert found[-1].fatal
    assert found[1000].line == 4 * 1000 + 2


@pytest.mark.parametrize(
    ("text", "good", "words"),
    [
        ('[{"a": 1}\n {"a": 2}]', 1, "line 2, column 2: Expecting ',' delimiter, found '{'"),
        ('[{"a": 1},\n]', 1, "line 2, column 1: Expecting value"),
        ('[{"a": 1}', 1, "line 1, column 10: Expecting ',' delimiter, the file ends here (cut off?)"),
        ('[{"a": "x', 0, "line 1, column 8: Unterminated string"),
        ('[{"a": 1}]\n[]', 1, "line 2, column 1: something follows the end"),
        ("<html>", 0, "line 1, column 1: expected a JSON array or objects, found '<'"),
        (" \n", 0, "expected a JSON array or objects, the file ends here"),
        ('[{"a": tru}]', 0, "line 1, column 8: Expecting value"),
        ('[{"a": 1}, ' + "9" * 5000 + "]", 1, "line 1, column 12"),
        ("[" + "[" * 100_000, 0, "line 1, column 2"),
    ],
)
def test_malformed_arrays(tmp_path, text, good, words):
    rows = rows_of(tmp_path / "a.json", text)
    assert len(rows) == good + 1
    assert rows[-1].fatal
    assert words in str(rows[-1].error)


@pytest.mark.parametrize("chunk", [8, 16, 1 << 20])
def test_an_array_that_is_not_utf8(tmp_path, chunk, tiny_chunks):
    tiny_chunks(chunk)
    rows = rows_of(tmp_path / "a.json", b'[{"a": 1},\n{"a": 2},\n{"a": "caf\xe9"},\n{"a": 3}]')
    assert [row.value for row in rows] == [{"a": 1}, {"a": 2}, None]
    assert rows[2].fatal
    assert rows[2].line == 3
    assert "not valid UTF-8 at line 3: byte 0xe9" in str(rows[2].error)
    assert "iconv" in str(rows[2].error)


def test_a_bracket_that_is_never_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW", 1 << 20)
    text = '[{"a": 1},\n{"m": [' + ",\n".join(['{"x": "yyyyyyyyyy"}'] * 200_000) + "]"
    rows = rows_of(tmp_path / "a.json", text)
    assert len(rows) == 2
    assert "starts at line 2 is longer than 1 MiB" in str(rows[1].error)


def test_json_that_is_something_else(tmp_path):
    path = tmp_path / "a.json"
    assert values(rows_of(path, "[]")) == []
    lines = rows_of(path, '{"a": 1}\n{"a": }\n{"a": 3}\n')
    assert [row.value for row in lines] == [{"a": 1}, None, {"a": 3}]
    pretty = rows_of(path, '{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert values(pretty) == [{"a": 1}, {"a": 2}]
    assert [row.line for row in pretty] == [1, 4]
    assert values(rows_of(path, '{"a": 1}')) == [{"a": 1}]
    assert rows_of(path, '{\n "a": 1')[-1].fatal
    bom = rows_of(path, '\ufeff[{"a": 1}]')
    assert values(bom) == [{"a": 1}]


def test_rows_under_a_key(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"a": 1}, {"a": 2}]
    assert values(rows_of(path, json.dumps({"data": rows}))) == rows
    around = {"version": "1.0", "n": 2, "data": rows, "test": [1], "x": {"y": None}}
    assert values(rows_of(path, json.dumps(around, indent=2))) == rows
    cut = rows_of(path, json.dumps(around)[:-1])
    assert cut[-1].fatal
    # lines that each have such a list are refused aloud, not read in part
    several = rows_of(path, '{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n')
    assert "line 2, column 1: something follows the end of the rows" in str(several[-1].error)


def array_file(path: Path, mib: int, row_chars: int) -> SourceFile:
    row = json.dumps({"instruction": "x" * row_chars, "output": "é"}, ensure_ascii=False)
    with path.open("w") as out:
        out.write("[")
        out.writelines(f"{row},\n" for _ in range(mib * 1_000_000 // len(row)))
        out.write(row + "]")
    return expand(str(path))[0]


def peak_of_reading(file: SourceFile) -> int:
    tracemalloc.start()
    try:
        assert all(row.error is None for row in read_rows(file))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_an_array_takes_constant_memory(tmp_path):
    small = peak_of_reading(array_file(tmp_path / "small.json", 3, 2000))
    large = peak_of_reading(array_file(tmp_path / "large.json", 30, 2000))
    assert large < 1.2 * small
    assert large < 12_000_000


def test_a_large_row_is_decoded_a_few_times_only(tmp_path, monkeypatch):
    """Decoding anew after each chunk would be quadratic in the size of a row."""
    tried = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
            tried.append(len(s) - idx)
            return super().raw_decode(s, idx)

    monkeypatch.setattr(sources, "_DECODER", Decoder())
    monkeypatch.setattr(sources, "_CHUNK", 1 << 14)
    path = write(tmp_path / "a.json", json.dumps([{"text": "x" * (8 << 20)}, {"a": 1}]))
    assert len(values(list(read_rows(expand(path)[0])))) == 2
    assert sum(tried) < 4 * (8 << 20)
