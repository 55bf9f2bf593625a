"""From a path, folder, glob, URI or Hugging Face dataset name to files."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from raytune_ds import hub, storage
from raytune_ds.errors import UserError

_CONTAINERS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "txt",
}
_COMPRESSIONS = (".gz", ".bz2", ".zst")
_KNOWN = f"{', '.join(_CONTAINERS)} (all but .parquet also with {', '.join(_COMPRESSIONS)})"
# a text file in a folder that is about the data, not data
_ABOUT = {"readme", "license", "licence", "notice"}
# what a URI may hold as it is; '%' too, as it may be quoted already
_URI_CHARS = "%/:?@!$&'()*+,;="
# the folder without a wildcard, and the pattern below it
_GLOB = re.compile(r"([^*?[]*/)?(.*[*?[].*)")


@dataclass(frozen=True)
class SourceFile:
    """One file of rows, or one dataset of the Hugging Face Hub."""

    path: str
    """An absolute local path, or a URI for `storage.open_filesystem`; the name of the dataset for `hub`."""
    container: str
    """`json`, `jsonl`, `csv`, `parquet`, `txt` or `hub`."""
    size: int
    """Bytes as stored (compressed or not); 0 for `hub`."""
    subset: str | None = None
    """Of a dataset of the Hub: its configuration; None where it has only one."""
    split: str = "train"
    """Of a dataset of the Hub."""


def expand(path: str, subset: str | None = None, split: str = "train") -> list[SourceFile]:
    """The files that `path` stands for, sorted by path: one or more.

    `path` is a file, a folder (the data files directly in it), a glob (`*`, `?`, `[..]`, `**`; in a URI `?`
    starts the query), a URI that pyarrow opens (s3://, gs://, file:// ...) or a dataset of the Hugging Face
    Hub ('org/name'), for which `subset` and `split` are.

    Raises:
        UserError: nothing is found, or what is found is empty or no data file.
    """
    place = _Place.at(path)
    info = place.info()
    if info.type == fs.FileType.File:
        return [_source_file(place, info)]
    if info.type == fs.FileType.Directory:
        return _folder_files(place)
    glob = _GLOB.fullmatch(_without_query(path))
    if glob:
        return _glob_files(path, glob[1] or ".", glob[2])
    if not _may_be_hub_name(path):
        raise UserError(_missing(place, path))
    try:
        hub.check_dataset(path)
    except UserError as error:
        raise UserError(f"{_missing(place, path)}. As a dataset of the Hub: {error}") from error
    return [SourceFile(path, "hub", 0, subset, split)]


@dataclass(frozen=True)
class _Place:
    """A path taken apart, so that what is found below it gets a name that can be opened again."""

    filesystem: fs.FileSystem
    inner: str
    """The path as the filesystem takes it."""
    name: str
    """The absolute local path, or the URI without its query."""
    query: str

    @staticmethod
    def at(path: str) -> "_Place":
        with _refusals_as_user_error(path, "opened"):
            if storage.is_local(path):
                filesystem, inner = storage.open_filesystem(path)
                return _Place(filesystem, inner, inner, "")
            uri = quote(path, safe=_URI_CHARS)
            filesystem, inner = storage.open_filesystem(uri)
            name = _without_query(uri)
            return _Place(filesystem, inner, name.rstrip("/"), uri.removeprefix(name))

    def info(self) -> fs.FileInfo:
        with _refusals_as_user_error(self.name, "looked at"):
            return self.filesystem.get_file_info(self.inner)

    def listing(self, folder: str) -> list[fs.FileInfo]:
        """What is directly in a folder, hidden entries left out; empty where there is no such folder."""
        with _refusals_as_user_error(folder, "listed"):
            infos = self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return sorted((i for i in infos if not i.base_name.startswith(".")), key=lambda i: i.path)

    def path_of(self, info: fs.FileInfo) -> str:
        """The local path or URI of what was found here or below."""
        if storage.is_local(self.name):
            return info.path
        below = info.path[len(self.inner) :].strip("/")
        return self.name + (f"/{quote(below)}" if below else "") + self.query


@contextmanager
def _refusals_as_user_error(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ImportError, RuntimeError) as error:  # the last for ~nobody
        raise UserError(f"{path}: can't be {what}: {error}") from error


def _without_query(path: str) -> str:
    return path if storage.is_local(path) else path.partition("?")[0]


def _source_file(place: _Place, info: fs.FileInfo) -> SourceFile:
    path = place.path_of(info)
    container = _container(info.base_name)
    if container is None:
        extension = PurePosixPath(info.base_name).suffix
        raise UserError(f"{path}: unknown extension '{extension}'; known are {_KNOWN}")
    if not info.size:
        raise UserError(f"{path}: the file is empty (0 bytes)")
    return SourceFile(path, container, info.size)


def _container(name: str) -> str | None:
    stem = name.lower()
    compression = next((end for end in _COMPRESSIONS if stem.endswith(end)), "")
    container = _CONTAINERS.get(PurePosixPath(stem.removesuffix(compression)).suffix)
    return None if compression and container == "parquet" else container


def _folder_files(place: _Place) -> list[SourceFile]:
    entries = place.listing(place.inner)
    data = [info for info in entries if info.type == fs.FileType.File and _is_data(info.base_name)]
    if not data:
        raise UserError(
            f"{place.name}: no data file directly in this folder, which has {_some(_names(entries))}. Known extensions"
            f" are {_KNOWN}; for the folders below it write {place.name}/**/*.jsonl"
        )
    return [_source_file(place, info) for info in data]


def _is_data(name: str) -> bool:
    about = name.startswith("_") or name.partition(".")[0].lower() in _ABOUT  # _SUCCESS, README.txt
    return _container(name) is not None and not about


def _glob_files(path: str, folder: str, pattern: str) -> list[SourceFile]:
    place = _Place.at(folder + path.removeprefix(_without_query(path)))
    found = {info.path: info for info in _walk(place, place.inner, pattern.split("/"))}
    files = [found[name] for name in sorted(found) if found[name].type == fs.FileType.File]
    if not files:
        raise UserError(
            f"{path}: no file matches; {place.name} has {_some(_names(place.listing(place.inner)))}"
        )
    # `data/*` means the data among them, `data/*.xlsx` is a mistake
    data = [info for info in files if _container(info.base_name)]
    return [_source_file(place, info) for info in data or files[:1]]


def _walk(place: _Place, folder: str, pattern: list[str]) -> Iterator[fs.FileInfo]:
    head, rest = pattern[0], pattern[1:]
    if head == "**" and rest:  # it also stands for no folder at all
        yield from _walk(place, folder, rest)
    for info in place.listing(folder):
        is_folder = info.type == fs.FileType.Directory
        if head == "**" and is_folder:
            yield from _walk(place, info.path, pattern)
        elif fnmatchcase(info.base_name, head):
            if not rest:
                yield info
            elif is_folder:
                yield from _walk(place, info.path, rest)


def _may_be_hub_name(path: str) -> bool:
    """'name' or 'org/name'; 'org/name-2.5' too, but nothing that ends like the name of a file."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    return is_name and re.search(r"\.[A-Za-z][A-Za-z0-9]{0,6}$", path) is None


def _missing(place: _Place, path: str) -> str:
    inner_folder, _, name = place.inner.rpartition("/")
    folder = place.name.rpartition("/")[0] or "/"
    # without a folder it is a bucket: its neighbours are not ours to list
    neighbours = place.listing(inner_folder) if inner_folder else []
    close = difflib.get_close_matches(name, _names(neighbours))
    if close:
        return f"{path}: no such file or folder; {folder} has {_some(close)}"
    return f"{path}: no such file or folder, nor anything of a similar name in {folder}"


def _names(infos: Iterable[fs.FileInfo]) -> list[str]:
    return [info.base_name for info in infos]


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "nothing"
