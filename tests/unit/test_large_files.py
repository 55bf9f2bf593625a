"""A file far larger than what a process may hold of it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from raytune_ds.data.readers import read_rows
from raytune_ds.data.scatter import memory_mib
from raytune_ds.data.sources import expand

MIB = 300
MAY_HOLD_MIB = 64
ROW = json.dumps({"instruction": "x" * 4_000, "output": "é" * 1_000}, ensure_ascii=False).encode()


def compressed(path: Path) -> IO[bytes]:
    return gzip.open(path, "wb", compresslevel=1)


@pytest.mark.parametrize(
    ("name", "opened"), [("a.json", lambda path: path.open("wb")), ("a.json.gz", compressed)]
)
def test_an_array_is_never_in_memory(tmp_path: Path, name: str, opened: Callable[[Path], Any]) -> None:
    """All that the process holds for itself counts, Arrow's buffers too, which tracemalloc does not see."""
    path, count = tmp_path / name, MIB * (1 << 20) // len(ROW)
    with opened(path) as file:
        file.write(b"[" + ROW)
        for _ in range(0, count - 1, 100):
            file.write((b",\n" + ROW) * 100)
        file.write(b"]")
    (source,) = expand(str(path))
    before, peak, read = memory_mib(), 0.0, 0
    for row in read_rows(source):
        assert row.error is None
        read += 1
        if read % 100 == 0:
            peak = max(peak, memory_mib())
    path.unlink()  # pytest keeps its folders
    assert read >= count
    assert peak - before < MAY_HOLD_MIB
