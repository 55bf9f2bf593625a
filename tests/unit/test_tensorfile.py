"""A safetensors file read by ranges: any range of any dtype, no more of the file than that, and no damage unnoticed."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds import storage, tensorfile
from raytune_ds.tensorfile import TensorFile

DTYPES = list(tensorfile._DTYPES.values())
SHAPES = {"matrix": (5, 7), "vector": (11,), "cube": (2, 3, 4), "one": (1,), "scalar": ()}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return values.to(torch.uint8).view(dtype).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def all_dtypes() -> dict[str, torch.Tensor]:
    """A tensor of every dtype and shape; in one file their beginnings are not aligned to their item sizes."""
    return {
        f"{name}.{number}": random_bits(shape, dtype, seed=number)
        for name, shape in SHAPES.items()
        for number, dtype in enumerate(DTYPES)
    }


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return str(path)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> TensorFile:
    path = tmp_path_factory.mktemp("tensors") / "all.safetensors"
    return TensorFile(write(path, all_dtypes(), {"format": "pt"}))


# ---- what is read ---------------------------------------------------------------------------------


def test_names_shapes_and_dtypes_are_those_of_the_file(everything: TensorFile) -> None:
    tensors = all_dtypes()
    assert everything.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name: everything.dtype(name) for name in tensors} == {n: t.dtype for n, t in tensors.items()}


def test_whole_tensors_of_every_dtype(everything: TensorFile) -> None:
    for name, tensor in reversed(all_dtypes().items()):
        assert same_bits(everything.read(name), tensor.reshape(-1)), name


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_range_of_every_dtype(everything: TensorFile, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(everything.shapes)))
    whole = all_dtypes()[name].reshape(-1)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    assert same_bits(everything.read(name, start, stop), whole[start:stop])
    assert same_bits(everything.read(name, start), whole[start:])


def test_what_is_read_belongs_to_the_reader(everything: TensorFile) -> None:
    first = everything.read("vector.0")
    first.zero_()
    assert same_bits(everything.read("vector.0"), all_dtypes()["vector.0"])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_tensor_without_elements(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    file = TensorFile(write(tmp_path / "x", {"a": torch.ones(2), "b": torch.ones(shape, dtype=dtype)}))
    assert file.shapes["b"] == shape
    assert same_bits(file.read("b"), torch.ones(0, dtype=dtype))
    assert same_bits(file.read("b", 0, 0), torch.ones(0, dtype=dtype))


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert TensorFile(write(tmp_path / "x", {})).shapes == {}
    assert TensorFile(write(tmp_path / "y", {}, {"format": "pt"})).shapes == {}


def test_an_unknown_name_is_a_key_error(everything: TensorFile) -> None:
    with pytest.raises(KeyError, match="absent"):
        everything.read("absent")


# ---- how little is read ---------------------------------------------------------------------------


class Counting:
    """A file that remembers how much was read of it, by every way to read."""

    def __init__(self, file: Any) -> None:
        self._file, self.total, self.closed = file, 0, False

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._file.close()

    def read(self, count: int = -1) -> bytes:
        content = self._file.read(count)
        self.total += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.total += count
        return count

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def size(self) -> int:
        return self._file.size()


def test_nothing_is_read_but_the_header_and_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x", {"large": torch.arange(100_000.0), "other": torch.ones(1000)})
    opened: list[Counting] = []
    open_file = storage.open_file

    def count(path: str) -> Counting:
        opened.append(Counting(open_file(path)))
        return opened[-1]

    monkeypatch.setattr(storage, "open_file", count)
    file = TensorFile(path)
    assert not opened, "made, but not asked for anything"
    assert file.shapes == {"large": (100_000,), "other": (1000,)}
    header = opened[0].total
    assert header < 300
    assert file.read("large", 70_000, 70_010).tolist() == list(range(70_000, 70_010))
    assert opened[1].total == 40
    file.read("large", 5, 5)
    assert [f.total for f in opened] == [header, 40], "the header is read once"
    assert all(f.closed for f in opened), "a process may read thousands of files"


# ---- damage ---------------------------------------------------------------------------------------


def read_all(file: TensorFile) -> dict[str, torch.Tensor]:
    return {name: file.read(name) for name in file.shapes}


def test_a_file_cut_off_anywhere_is_noticed(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    path = tmp_path / "x.safetensors"
    write(path, tensors)
    content = path.read_bytes()
    assert len(read_all(TensorFile(str(path)))) == 3
    unnoticed = []
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            read_all(TensorFile(str(path)))
            unnoticed.append(length)
        except (OSError, ValueError):
            pass
    assert unnoticed == []


def test_a_file_that_is_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.arange(10.0)})
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="longer than it should be"):
        read_all(TensorFile(str(path)))


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(1000)})
    file = TensorFile(str(path))
    assert file.shapes == {"a": (1000,)}
    os.truncate(path, 200)
    with pytest.raises(OSError, match=r"x\.safetensors: ends too early"):
        file.read("a", 500, 501)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        "一行文字。\n".encode() * 20,
        pickle.dumps({"a": list(range(100))}),
        (8).to_bytes(8, "little") + b"not JSON",
        (2).to_bytes(8, "little") + b'{"',
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (1 << 63).to_bytes(8, "little") + b"{}",
        bytes(64),  # what a file system shows after a power cut
    ],
)
def test_what_is_no_safetensors_file_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011
        _ = TensorFile(str(tmp_path / "x")).shapes


def test_a_missing_file_is_an_error_of_the_system_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        _ = TensorFile(f"{tmp_path}/absent").shapes


# ---- elsewhere ------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a path a URI that is reached through pyarrow alone."""
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    local = storage.open_filesystem

    def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
        inside = path.removeprefix("mem://")
        return (store, inside) if inside != path else local(path)

    monkeypatch.setattr(storage, "open_filesystem", open_filesystem)
    return lambda name: f"mem://{name}"


def test_a_file_of_an_object_store(tmp_path: Path, elsewhere: Callable[[str], str]) -> None:
    write(tmp_path / "x.safetensors", all_dtypes())
    file = TensorFile(elsewhere("x.safetensors"))
    for name, tensor in all_dtypes().items():
        flat = tensor.reshape(-1)
        assert same_bits(file.read(name, 1), flat[1:])
        assert same_bits(file.read(name, 0, flat.numel() // 2), flat[: flat.numel() // 2])
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "y").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="cut off"):
        read_all(TensorFile(elsewhere("y")))
    write(tmp_path / "z", {"a": torch.ones(1000)})
    cut = TensorFile(elsewhere("z"))
    assert cut.shapes == {"a": (1000,)}
    os.truncate(tmp_path / "z", 200)
    with pytest.raises(OSError, match="mem://z: ends too early"):
        cut.read("a")
    with pytest.raises(FileNotFoundError, match="absent"):
        _ = TensorFile(elsewhere("absent")).shapes
