"""Files to rows: what is read, what is refused and what the refusal says."""

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

from raytune_ds import hub
from raytune_ds.data import readers_json, readers_lines
from raytune_ds.data.readers import Row, read_rows
from raytune_ds.data.sources import SourceFile, expand
from raytune_ds.errors import UserError


def rows_of(path: Path, content: str | bytes) -> list[Row]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (file,) = expand(str(path))
    rows = list(read_rows(file))
    assert [row.index for row in rows] == list(range(len(rows)))
    assert not any(row.fatal for row in rows[:-1])
    assert all((row.value is None) == (row.error is not None) for row in rows)
    return rows


def values(rows: list[Row]) -> list[Any]:
    assert [row.error for row in rows if row.error] == []
    return [row.value for row in rows]


# ---- lines -----------------------------------------------------------------------------------------


def test_jsonl(tmp_path):
    content = '\ufeff{"a": 1}\r\n\n  {"a": NaN}\n{"a": }\n[1]\n3\n{"a": "é\u2028"}'
    rows = rows_of(tmp_path / "a.jsonl", content)
    assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7]
    assert rows[0].value == {"a": 1}
    assert rows[2].error == "malformed JSON at line 4, column 7: Expecting value"
    assert rows[3].error == "the row is a list, expected an object"
    assert rows[4].error == "the row is a number, expected an object"
    assert rows[5].value == {"a": "é\u2028"}
    assert not any(row.fatal for row in rows)


def test_jsonl_that_is_an_array(tmp_path):
    assert "name the file .json" in str(rows_of(tmp_path / "a.jsonl", '[\n{"a": 1}\n]')[0].error)


def test_jsonl_that_python_refuses(tmp_path):
    rows = rows_of(tmp_path / "a.jsonl", "9" * 5000 + "\n" + "[" * 200_000 + '\n{"a": 1}')
    assert "line 1: " in str(rows[0].error)
    assert "line 2: " in str(rows[1].error)
    assert rows[2].value == {"a": 1}


def test_txt(tmp_path):
    rows = rows_of(tmp_path / "a.txt", "\ufeff one \n\n \t\ntwo\u2028more\r\n")
    assert values(rows) == [{"text": " one "}, {"text": "two\u2028more"}]
    assert [row.line for row in rows] == [1, 4]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_lines, "MAX_ROW", 1 << 20)
    (row,) = rows_of(tmp_path / "a.jsonl", '{"a": "' + "x" * (2 << 20) + '"}\n{}')
    assert row.fatal
    assert "line 1 is longer than 1 MiB" in str(row.error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": "1"}\n{"a": "caf\xe9"}\n{"a": "3"}\n'),
        ("a.json", b'[{"a": "1"},\n{"a": "caf\xe9"}, {"a": "3"}]'),
        ("a.txt", b"1\ncaf\xe9\n3"),
        ("a.csv", b'a\n1\n"caf\xe9"\n3\n'),
    ],
)
def test_what_is_not_utf8_costs_one_row(tmp_path, name, content):
    rows = rows_of(tmp_path / name, content)
    assert [row.error is None for row in rows] == [True, False, True]
    line = 3 if name == "a.csv" else 2
    assert rows[1].line == line
    assert f"not valid UTF-8 at line {line}: byte 0xe9" in str(rows[1].error)
    assert "iconv -f ENCODING -t UTF-8" in str(rows[1].error)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_utf16(tmp_path, name):
    (row,) = rows_of(tmp_path / name, '[{"a": 1}]'.encode("UTF-16"))
    assert row.fatal
    assert "iconv -f UTF-16 -t UTF-8" in str(row.error)


def test_git_lfs_pointer(tmp_path):
    (row,) = rows_of(tmp_path / "a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert row.fatal
    assert "git lfs pull" in str(row.error)


def test_compressed(tmp_path):
    data = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(100_000)))
    assert len(values(rows_of(tmp_path / "a.jsonl.gz", data))) == 100_000
    last = rows_of(tmp_path / "b.jsonl.gz", data[: len(data) // 2])[-1]
    assert last.fatal
    assert "can't be read from here on" in str(last.error)


# ---- CSV -------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    content = '\ufeffa,b\r\n1,"two\nlines"\n\n1\n1,2,3\n"x"y,2\n,é\n'
    rows = rows_of(tmp_path / "a.csv", content)
    assert [row.line for row in rows] == [2, 5, 6, 7, 8]
    assert rows[0].value == {"a": "1", "b": "two\nlines"}
    assert "line 5 has 1 cells, the header has 2" in str(rows[1].error)
    assert "line 6 has 3 cells" in str(rows[2].error)
    assert "malformed CSV at line 7" in str(rows[3].error)
    assert rows[4].value == {"a": "", "b": "é"}


def test_csv_headers(tmp_path):
    assert rows_of(tmp_path / "a.csv", "a,b\n") == []
    for content, words in (
        (b"a,b,a\n1,2,3\n", "column 'a' twice"),
        (b"\n\n", "no header"),
        (b"caf\xe9\nx\n", "not valid UTF-8"),
    ):
        (row,) = rows_of(tmp_path / "a.csv", content)
        assert row.fatal
        assert words in str(row.error)


@pytest.mark.parametrize("limit", [64 << 20, 1 << 20])
def test_csv_quote_that_is_never_closed(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(readers_lines, "MAX_ROW", limit)
    rows = rows_of(tmp_path / "a.csv", 'a,b\n1,2\n3,"x\n' + "1,2\n" * 500_000)
    assert len(rows) == 2
    assert rows[1].line == 3
    assert rows[1].fatal
    assert "never closed" in str(rows[1].error)


def test_long_csv_cells(tmp_path):
    assert values(rows_of(tmp_path / "a.csv", "a\n" + "x" * 300_000))[0]["a"] == "x" * 300_000


# ---- Parquet, the Hub ------------------------------------------------------------------------------


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
    raw = pa.array([b"ok", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "b.parquet")
    (row,) = read_rows(expand(str(tmp_path / "b.parquet"))[0])
    assert row.fatal
    assert "0xff" in str(row.error)


def test_hub_rows(monkeypatch):
    import datasets

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> Iterator[dict]:
        assert (name, subset, split, streaming) == ("org/name", "main", "train", True)
        yield {"text": "a"}
        raise ValueError("Bad split: train. Available splits: ['test']\nmore")

    monkeypatch.setattr(hub, "check_dataset", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(SourceFile("org/name", "hub", 0, subset="main"))
    assert next(rows) == Row(0, None, {"text": "a"}, None)
    with pytest.raises(UserError, match=r"'org/name'.*'train'.*Available splits: \['test'\]"):
        next(rows)


# ---- JSON ------------------------------------------------------------------------------------------

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
    chunk=st.integers(1, 400),
)
def test_an_array_reads_back_equal(tmp_path_factory, rows, indent, ascii_only, chunk):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path_factory.getbasetemp() / "roundtrip.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers_json, "CHUNK", chunk)
        assert values(rows_of(path, text)) == rows


@pytest.mark.parametrize("chunk", range(1, 40))
def test_values_cut_anywhere(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(readers_json, "CHUNK", chunk)
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
    words = f"malformed JSON at line {wrong + 2}: Expecting ',' delimiter, found '\"text\": \""
    assert str(found[-1].error).startswith(words)
    assert found[-1].line == wrong  # its opening brace: the line before, 1-based
    assert found[-1].fatal
    assert found[1000].line == 4 * 1000 + 2


@pytest.mark.parametrize(
    ("text", "good", "words"),
    [
        ('[{"a": 1}\n {"a": 2}]', 1, "line 2: Expecting ',' delimiter, found '{\"a\": 2}]'"),
        ('[{"a": 1},\n]', 1, "line 2: Expecting value, found ']'"),
        ('[{"a": 1}', 1, "line 1: Expecting ',' delimiter, the file ends here (cut off?)"),
        ('[{"a": "x', 0, "line 1: Unterminated string"),
        ('[{"a": 1}]\n[]', 1, "line 2: something follows the end"),
        ("<html>", 0, "line 1: expected a JSON array or objects, found '<html>'"),
        (" \n", 0, "expected a JSON array or objects, the file ends here"),
        ('[{"a": tru}]', 0, "line 1: Expecting value, found 'tru}]'"),
        ('[{"a": 1}, ' + "9" * 5000 + "]", 1, "line 1: Exceeds the limit"),
        ("[" + "[" * 100_000, 0, "line 1: "),
    ],
)
def test_malformed_arrays(tmp_path, text, good, words):
    rows = rows_of(tmp_path / "a.json", text)
    assert len(rows) == good + 1
    assert rows[-1].fatal
    assert words in str(rows[-1].error)


def test_a_bracket_that_is_never_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_json, "MAX_ROW", 1 << 20)
    text = '[{"a": 1},\n{"m": [' + ",\n".join(['{"x": "yyyyyyyyyy"}'] * 200_000) + "]"
    rows = rows_of(tmp_path / "a.json", text)
    assert len(rows) == 2
    assert "starts at line 2 is longer than 1 MiB" in str(rows[1].error)


def test_json_that_is_no_array(tmp_path):
    path = tmp_path / "a.json"
    lines = rows_of(path, '\ufeff{"a": 1}\n{"a": }\n{"a": 3}\n')
    assert [row.value for row in lines] == [{"a": 1}, None, {"a": 3}]
    pretty = rows_of(path, '\ufeff{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert values(pretty) == [{"a": 1}, {"a": 2}]
    assert [row.line for row in pretty] == [1, 4]
    assert values(rows_of(path, '{"a": 1}')) == [{"a": 1}]
    assert rows_of(path, '{\n "a": 1')[-1].fatal


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
    assert "line 2: something follows the end of the rows" in str(several[-1].error)


def array_file(path: Path, mib: int) -> SourceFile:
    row = json.dumps({"instruction": "x" * 2000, "output": "é"}, ensure_ascii=False)
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
    small = peak_of_reading(array_file(tmp_path / "small.json", 3))
    large = peak_of_reading(array_file(tmp_path / "large.json", 30))
    assert large < 1.2 * small
    assert large < 12_000_000


def test_a_large_row_is_decoded_a_few_times_only(tmp_path, monkeypatch):
    """Decoding anew after each chunk would be quadratic in the size of a row."""
    tried = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
            tried.append(len(s) - idx)
            return super().raw_decode(s, idx)

    monkeypatch.setattr(readers_json, "_DECODER", Decoder())
    monkeypatch.setattr(readers_json, "CHUNK", 1 << 14)
    content = json.dumps([{"text": "x" * (8 << 20)}, {"a": 1}])
    assert len(values(rows_of(tmp_path / "a.json", content))) == 2
    assert sum(tried) < 4 * (8 << 20)
