"""From a path, folder, glob, URI or Hugging Face dataset name to files, and from a file to rows.

Everything streams: memory is bounded by the longest row (64 MiB at most), never by the size of the file.
"""

import codecs
import csv
import difflib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raytune_ds.data.formats import kind_of
from raytune_ds.errors import UserError

MAX_ROW = 64 << 20  # bytes, characters in JSON arrays; longer than any context, so something is never closed
HUB_TIMEOUT_S = 10.0

_CHUNK = 1 << 20  # bytes a read
_PARQUET_BATCH = 64  # rows; some are whole books
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


@dataclass(frozen=True)
class SourceFile:
    """One file of rows, or one dataset of the Hugging Face Hub."""

    path: str
    """An absolute local path, or a URI for `open_filesystem`; the name of the dataset for `hub`."""
    container: str
    """`json`, `jsonl`, `csv`, `parquet`, `txt` or `hub`."""
    size: int
    """Bytes as stored (compressed or not); 0 for `hub`."""


@dataclass(frozen=True)
class Row:
    """One row of a file, or why it can't be had."""

    index: int
    """0-based within its file; rows that can't be read count too."""
    line: int | None
    """1-based line where the row starts, where the container has lines."""
    value: dict[str, Any] | None
    error: str | None
    """Why `value` is None; makes sense behind 'file, row N: '."""
    fatal: bool = False
    """The rest of the file can't be read; this is its last `Row`."""


@dataclass(frozen=True)
class _Bad:
    """What a reader yields in the place of a value it can't read."""

    error: str
    fatal: bool = False


# what the readers of the containers yield: line, and the value or a `_Bad`
_Found = tuple[int | None, Any]


# ---- from a path to files ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A path taken apart, so that what is found below it gets a name that can be opened again."""

    filesystem: fs.FileSystem
    inner: str
    """The path as the filesystem takes it."""
    base: str = ""
    """What the filesystem calls the root of the URI."""
    root: str = ""
    """scheme://authority; empty where local."""
    query: str = ""

    def name(self, inner: str) -> str:
        """The local path or URI of a path of this filesystem."""
        if not self.root:
            return inner
        return f"{self.root}/{inner[len(self.base) :].lstrip('/')}{self.query}"


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Returns the filesystem of a URI or local path, and the path within it.

    A local path gets its ~ expanded and is made absolute. Raises UserError where the scheme is unknown, the
    bucket can't be reached, or the URI holds credentials.
    """
    place = _place(path)
    return place.filesystem, place.inner


def expand(path: str) -> list[SourceFile]:
    """The files that `path` stands for, sorted by path: one or more.

    `path` is a file, a folder (the data files directly in it), a glob (`*`, `?`, `[..]`, `**`; in a URI `?`
    starts the query), a URI that pyarrow opens (s3://, gs://, file:// ...) or a dataset of the Hugging Face
    Hub ('org/name'). Raises UserError where nothing is found, or what is found is empty or no data file.
    """
    if not path.strip():
        raise UserError("a data source has an empty path")
    place = _place(path)
    info = _info(place, path)
    if info.type == fs.FileType.File:
        return [_source_file(place, info)]
    if info.type == fs.FileType.Directory:
        return _folder_files(place, path)
    if _glob_start(place.inner) is not None:
        return _glob_files(place, path)
    if not place.root and _may_be_hub_name(path):
        return [_hub_source(path, _close_matches(place))]
    raise UserError(_missing(place, path))


def _place(path: str) -> _Place:
    scheme, separator, rest = path.partition("://")
    if not separator or scheme == "file":
        # RFC 8089: a file URI is percent-encoded
        return _local_place(unquote(urlsplit(path).path) if separator else path)
    authority, _, tail = rest.partition("/")
    if ":" in authority.rpartition("@")[0]:
        raise UserError(
            f"{scheme}://***@{authority.rpartition('@')[2]}/{tail}: a URI must not hold credentials;"
            " put them into the environment of the nodes (AWS_ACCESS_KEY_ID ...)"
        )
    authority, _, early_query = authority.partition("?")
    key, _, query = tail.partition("?")
    query = f"?{query or early_query}" if query or early_query else ""
    root = f"{scheme}://{authority}"
    try:
        # the key stays out of it: object stores take it literally, a URI parser would not
        filesystem, base = fs.FileSystem.from_uri(root + query)
    except (pa.ArrowException, OSError, ImportError) as error:
        raise UserError(
            f"{path}: can't be opened: {_first_line(error)}. Sources are local paths, s3://, gs://, file://"
            " and other URIs that pyarrow opens, and datasets of the Hugging Face Hub"
        ) from error
    return _Place(filesystem, f"{base.rstrip('/')}/{key}".rstrip("/") or base, base, root, query)


def _local_place(path: str) -> _Place:
    try:
        return _Place(fs.LocalFileSystem(), str(Path(path).expanduser().absolute()))
    except RuntimeError as error:  # ~name of nobody
        raise UserError(f"{path}: {_first_line(error)}") from error


def _info(place: _Place, path: str) -> fs.FileInfo:
    try:
        return place.filesystem.get_file_info(place.inner)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be looked at: {_first_line(error)}") from error


def _listing(place: _Place, folder: str) -> list[fs.FileInfo]:
    """What is directly in a folder, hidden entries left out; empty where there is no such folder."""
    try:
        infos = place.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    except NotADirectoryError:
        return []
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{place.name(folder)}: can't be listed: {_first_line(error)}") from error
    return sorted((info for info in infos if not info.base_name.startswith(".")), key=lambda info: info.path)


def _container(name: str) -> str | None:
    stem = name.lower()
    compression = next((end for end in _COMPRESSIONS if stem.endswith(end)), "")
    container = _CONTAINERS.get(PurePosixPath(stem.removesuffix(compression)).suffix)
    return None if compression and container == "parquet" else container


def _source_file(place: _Place, info: fs.FileInfo) -> SourceFile:
    name = place.name(info.path)
    container = _container(info.base_name)
    if container is None:
        raise UserError(f"{name}: unknown extension '{PurePosixPath(name).suffix}'; known are {_KNOWN}")
    if not info.size:
        raise UserError(f"{name}: the file is empty (0 bytes)")
    return SourceFile(name, container, info.size)


def _folder_files(place: _Place, path: str) -> list[SourceFile]:
    entries = _listing(place, place.inner)
    files = [info for info in entries if info.type == fs.FileType.File]
    data = [info for info in files if _is_data(info.base_name)]
    if data:
        return [_source_file(place, info) for info in data]
    folders = [info.base_name for info in entries if info.type == fs.FileType.Directory]
    if folders:
        raise UserError(
            f"{path}: no data file directly in this folder; it has the folders {_some(folders)}:"
            f" name one, or all files below as {path.rstrip('/')}/**/*.jsonl"
        )
    if files:
        names = _some(info.base_name for info in files)
        raise UserError(f"{path}: no data file in this folder, only {names}; known extensions are {_KNOWN}")
    raise UserError(f"{path}: the folder is empty")


def _is_data(name: str) -> bool:
    about = name.startswith("_") or name.partition(".")[0].lower() in _ABOUT  # _SUCCESS, README.txt
    return _container(name) is not None and not about


def _glob_start(inner: str) -> int | None:
    """The number of the first component with a wildcard."""
    return next((i for i, part in enumerate(inner.split("/")) if re.search(r"[*?[]", part)), None)


def _glob_files(place: _Place, path: str) -> list[SourceFile]:
    parts = place.inner.split("/")
    start = _glob_start(place.inner) or 0
    folder = "/".join(parts[:start]) or "/"
    found = {info.path: info for info in _walk(place, folder, parts[start:])}
    files = [found[name] for name in sorted(found) if found[name].type == fs.FileType.File]
    if not files:
        there = [info.base_name for info in _listing(place, folder)]
        has = f"has {_some(there)}" if there else "is empty or does not exist"
        raise UserError(f"{path}: no file matches; the folder {place.name(folder)} {has}")
    # `data/*` means the data among them, `data/*.xlsx` is a mistake
    return [_source_file(place, info) for info in files if _container(info.base_name)] or [
        _source_file(place, files[0])
    ]


def _walk(place: _Place, folder: str, pattern: list[str]) -> Iterator[fs.FileInfo]:
    head, rest = pattern[0], pattern[1:]
    if head == "**" and rest:  # it also stands for no folder at all
        yield from _walk(place, folder, rest)
    for info in _listing(place, folder):
        is_folder = info.type == fs.FileType.Directory
        if not fnmatchcase(info.base_name, head):
            continue
        if head == "**" and is_folder:
            yield from _walk(place, info.path, pattern)
        elif not rest:
            yield info
        elif is_folder and head != "**":
            yield from _walk(place, info.path, rest)


def _missing(place: _Place, path: str) -> str:
    folder = place.inner.rpartition("/")[0] or "/"
    close = _close_matches(place)
    if close:
        return f"{path}: no such file or folder; {place.name(folder)} has {_some(close)}"
    if place.filesystem.get_file_info(folder).type != fs.FileType.Directory:
        return f"{path}: no such file: there is no folder {place.name(folder)}"
    return f"{path}: no such file or folder, nor anything of a similar name in {place.name(folder)}"


def _close_matches(place: _Place) -> list[str]:
    folder, _, name = place.inner.rpartition("/")
    if place.root and not folder:  # a missing bucket: its neighbours are not ours to list
        return []
    return difflib.get_close_matches(name, [info.base_name for info in _listing(place, folder or "/")])


def _some(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")


# ---- the Hugging Face Hub ------------------------------------------------------------------------


def _may_be_hub_name(path: str) -> bool:
    """'name' or 'org/name'; 'org/name-2.5' too, but nothing that ends like the name of a file."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    return is_name and re.search(r"\.[A-Za-z][A-Za-z0-9]{0,6}$", path) is None


def _hub_source(name: str, close: list[str]) -> SourceFile:
    try:
        _check_hub(name)
    except UserError as error:
        hint = f"; here are {_some(close)}" if close else ""
        raise UserError(f"{name}: no such file or folder{hint}. As a dataset of the Hub: {error}") from error
    return SourceFile(name, "hub", 0)


def _check_hub(name: str) -> None:
    """Raises UserError where the Hub does not answer within seconds, or knows no such dataset.

    One request without a retry; `datasets` itself tries for half a minute and more before it gives up.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{name}"
        raise UserError(f"'{name}' is gated: accept its terms at {page} and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"there is no '{name}', or it is private: check the name, or set HF_TOKEN") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"the Hub is not asked for '{name}': HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"the Hub did not serve '{name}': {_first_line(error)}") from error
    except Exception as error:  # its HTTP library's own, which changes with its version
        raise UserError(
            f"the Hub can't be reached for '{name}' ({type(error).__name__}: {_first_line(error)}): check the network,"
            " or copy the data here and name its path"
        ) from error


def _hub_rows(name: str) -> Iterator[_Found]:
    _check_hub(name)
    from datasets import load_dataset

    try:
        for row in load_dataset(name, split="train", streaming=True):
            yield None, dict(row)
    except Exception as error:  # errors of its filesystems, HTTP library and readers come through as they are
        raise UserError(
            f"Hugging Face dataset '{name}': its split 'train' can't be read: {type(error).__name__}:"
            f" {_first_line(error)}. Where it has other splits or several configurations, download the files"
            " you want and name their path"
        ) from error


# ---- from a file to rows -------------------------------------------------------------------------


def read_rows(file: SourceFile) -> Iterator[Row]:
    """The rows of a file in order, those that can't be read included.

    After a `fatal` row nothing follows. Raises UserError where a dataset of the Hub can't be read (on), as
    that says nothing about its rows.
    """
    for index, (line, value) in enumerate(_found_rows(file)):
        if isinstance(value, _Bad):
            yield Row(index, line, None, value.error, value.fatal)
            if value.fatal:
                return
        elif isinstance(value, dict):
            yield Row(index, line, value, None)
        else:
            yield Row(index, line, None, f"the row is {kind_of(value)}, expected an object")


def _found_rows(file: SourceFile) -> Iterator[_Found]:
    if file.container == "hub":
        yield from _hub_rows(file.path)
        return
    filesystem, inner = open_filesystem(file.path)
    try:
        if file.container == "parquet":
            yield from _parquet_rows(filesystem, inner)
        else:
            yield from _text_rows(filesystem, inner, file.container)
    except (pa.ArrowException, OSError) as error:
        yield None, _Bad(f"the file can't be read from here on: {_first_line(error)}", fatal=True)


def _parquet_rows(filesystem: fs.FileSystem, inner: str) -> Iterator[_Found]:
    # without pre_buffer a row group's pages come as they are needed, not all at once
    with (
        filesystem.open_input_file(inner) as handle,
        pq.ParquetFile(handle, pre_buffer=False, buffer_size=_CHUNK) as parquet,
    ):
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH):
            for row in _batch_rows(batch):
                yield None, row


def _batch_rows(batch: pa.RecordBatch) -> list[Any]:
    """The rows of a batch; of one that can't be converted as a whole, row by row to find the bad ones."""
    try:
        return batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError) as error:  # broken UTF-8; dates that Python can't hold
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]
        return [_Bad(f"the row can't be read: {_first_line(error)}")]


def _text_rows(filesystem: fs.FileSystem, inner: str, container: str) -> Iterator[_Found]:
    name = PurePosixPath(inner).name
    with (
        filesystem.open_input_stream(inner, compression="detect") as raw,
        io.BufferedReader(raw, _CHUNK) as stream,
    ):
        refusal = _refusal(stream.peek(_CHUNK)[:64], name)
        if refusal:
            yield 1, _Bad(refusal, fatal=True)
            return
        if stream.peek(_CHUNK).startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        readers = {"json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows, "txt": _txt_rows}
        yield from readers[container](stream, name)


def _refusal(head: bytes, name: str) -> str | None:
    """Why a file that begins like this is no text of ours."""
    if head.startswith(b"version https://git-lfs"):
        return f"{name} is a Git LFS pointer, not the data itself: run 'git lfs pull'"
    # UTF-32's little-endian mark begins with UTF-16's
    for marks, encoding in (
        ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
        ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
    ):
        if head.startswith(marks):
            return f"{name} looks like {encoding}, expected UTF-8: {_iconv(name, encoding)}"
    return None


def _iconv(name: str, encoding: str) -> str:
    return f"convert it with: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}"


def _not_utf8(byte: int, line: int, name: str) -> str:
    guess = "CP1252 or GBK, say"
    return f"not valid UTF-8 at line {line}: byte 0x{byte:02x}; {_iconv(name, 'ENCODING')} ({guess})"


# ---- lines ---------------------------------------------------------------------------------------


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines; one of more than MAX_ROW bytes comes in pieces."""
    return enumerate(iter(lambda: stream.readline(MAX_ROW + 1), b""), 1)


def _text_lines(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str | _Bad]]:
    """The lines that are not blank, without their ends."""
    for number, line in _lines(stream):
        if len(line) > MAX_ROW:
            error = f"line {number} is longer than {MAX_ROW >> 20} MiB: is it really one row?"
            yield number, _Bad(error, fatal=True)
            return
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as bad:
            yield number, _Bad(_not_utf8(line[bad.start], number, name))
            continue
        if text.strip():
            yield number, text


def _txt_rows(stream: io.BufferedReader, name: str) -> Iterator[_Found]:
    for number, text in _text_lines(stream, name):
        yield number, text if isinstance(text, _Bad) else {"text": text}


def _jsonl_rows(stream: io.BufferedReader, name: str) -> Iterator[_Found]:
    for number, text in _text_lines(stream, name):
        yield number, text if isinstance(text, _Bad) else _parsed(text, number)


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (an array over several lines? name the file .json)" if text.lstrip().startswith("[") else ""
        return _Bad(f"malformed JSON at line {line}, column {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        return _Bad(f"malformed JSON at line {line}: {_first_line(error)}")


def _csv_rows(stream: io.BufferedReader, name: str) -> Iterator[_Found]:
    records = _csv_records(stream, name)
    line, header = next(records, (1, _Bad("the CSV file has no header line")))
    if isinstance(header, _Bad):
        yield line, _Bad(header.error, fatal=True)
        return
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        yield line, _Bad(f"the CSV header has the column '{twice[0]}' twice", fatal=True)
        return
    for line, cells in records:
        if isinstance(cells, _Bad):
            yield line, cells
        elif len(cells) != len(header):
            counts = f"{len(cells)} cells, the header has {len(header)}"
            yield line, _Bad(f"the row at line {line} has {counts} (a comma outside quotes?)")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _csv_records(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, list[str] | _Bad]]:
    """Header and rows, each with the line where it starts; blank lines are left out."""
    # a quote that is never closed makes one cell of the rest of the file
    csv.field_size_limit(MAX_ROW)
    # undecodable bytes travel as lone surrogates, so that they cost one row and not the file
    reader = csv.reader((line.decode(errors="surrogateescape") for _, line in _lines(stream)), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            endless = re.search("field larger|end of data", str(error))
            hint = " (a quote that is never closed?)" if endless else ""
            yield line, _Bad(f"malformed CSV at line {line}: {error}{hint}", fatal=bool(endless))
            continue
        wrong = _escaped_byte(cells)
        if wrong is not None:
            yield line, _Bad(_not_utf8(wrong, line, name))
        elif cells:
            yield line, cells


def _escaped_byte(cells: list[str]) -> int | None:
    """The first undecodable byte of a row, from the surrogate that stands for it."""
    for cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            return ord(cell[error.start]) & 0xFF
    return None


# ---- JSON ----------------------------------------------------------------------------------------

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
# an object that holds the rows under a key, scalars at most before it: {"version": "1.0", "data": [{...
_WRAPPER = re.compile(
    r'\s*\{\s*(?:"\w*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,\s*)*'
    r'"(?:data|rows|train|examples|instances)"\s*:\s*(?=\[\s*\{)'
)
# how far before the end of a cut text raw_decode may stumble over the cut; the longest piece of JSON that is
# no string is '-Infinity', the longest escape in one '\ud83d\ude00'
_CUT_MARGIN = 16


def _json_rows(stream: io.BufferedReader, name: str) -> Iterator[_Found]:
    """Rows of a JSON array, of JSON lines, of objects one after the other, or of the array in an object."""
    head = stream.peek(_CHUNK).lstrip()
    if head.startswith(b"{") and not _WRAPPER.match(head[:65536].decode(errors="replace")):
        first_line = head.partition(b"\n")[0].rstrip()
        if first_line.endswith(b"}") or b"\n" not in head:
            return _jsonl_rows(stream, name)
        return _object_rows(_JsonText(stream, name))
    return _array_rows(_JsonText(stream, name))


def _object_rows(text: "_JsonText") -> Iterator[_Found]:
    line = 1
    try:
        while text.next_char():
            line = text.line
            yield line, text.value()
    except _MalformedError as error:
        yield line, _Bad(str(error), fatal=True)


def _array_rows(text: "_JsonText") -> Iterator[_Found]:
    line = 1
    try:
        wrapped = text.skip(_WRAPPER)
        text.expect("[", "expected a JSON array or objects")
        more = text.next_char() != "]"
        while more:
            text.next_char()
            line = text.line
            yield line, text.value()
            more = text.next_char() == ","
            if more:
                text.expect(",")
        text.expect("]", "Expecting ',' delimiter")
        if wrapped:
            _skip_members(text)
        text.expect("", "something follows the end of the rows")
    except _MalformedError as error:
        yield line, _Bad(str(error), fatal=True)


def _skip_members(text: "_JsonText") -> None:
    """The rest of the object that held the rows; read, so that a file cut short does not pass for whole."""
    while text.next_char() == ",":
        text.expect(",")
        text.next_char()
        text.value()
        text.expect(":", "Expecting ':' delimiter")
        text.next_char()
        text.value()
    text.expect("}", "Expecting ',' delimiter")


class _MalformedError(Exception):
    """The JSON text can't be read; the message says where and why."""


class _JsonText:
    """A window of text that slides over a stream of bytes, and knows its lines.

    Its methods raise _MalformedError, also where the bytes are no UTF-8 and the text before them is used up.
    """

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream = stream
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._pos = 0  # what is before is used up
        self._line, self._counted = 1, 0  # the line number at the position _counted
        self._column = 1  # of the text's first character
        self._ended = False
        self._bad_byte: int | None = None
        self._grow()

    @property
    def line(self) -> int:
        """The 1-based line of what comes next."""
        self._line += self._text.count("\n", self._counted, self._pos)
        self._counted = self._pos
        return self._line

    def next_char(self) -> str:
        """The next character that is not space, not taken; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._pos)
            assert match is not None
            self._pos = match.end()
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._grow():
                return ""

    def expect(self, char: str, otherwise: str = "") -> None:
        """Takes `char` (empty: the end) as the next one that is not space."""
        found = self.next_char()
        if found != char:
            what = f"found {found!r}" if found else "the file ends here (cut off?)"
            raise self._malformed(f"{otherwise}, {what}", self._pos)
        self._pos += len(char)

    def skip(self, pattern: re.Pattern) -> bool:
        """Takes what `pattern` matches at the beginning of the text, if it does."""
        match = pattern.match(self._text, self._pos, self._pos + 65536)
        self._pos = match.end() if match else self._pos
        return match is not None

    def value(self) -> Any:
        """Takes the next JSON value; there must be no space before it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._pos)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._grow():
                    continue
                raise self._malformed(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._malformed(_first_line(error), self._pos) from None
            # '12' at the end of the text may go on as '123'
            if end < len(self._text) or self._text[end - 1] in '}]"' or not self._grow():
                self._pos = end
                return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        at_end = error.pos >= len(self._text) - _CUT_MARGIN
        return at_end or error.msg.startswith("Unterminated string")

    def _grow(self) -> bool:
        """Reads on; False at the end of the file, and then nothing has moved.

        Reads at least as much as is pending: what is decoded in vain adds up to no more than the row itself.
        """
        if self._bad_byte is not None:
            line, _ = self._where(len(self._text))
            raise _MalformedError(_not_utf8(self._bad_byte, line, self._name))
        pending = len(self._text) - self._pos
        if pending > MAX_ROW:
            raise _MalformedError(
                f"the row that starts at line {self.line} is longer than {MAX_ROW >> 20} MiB: a bracket or"
                " quote that is never closed?"
            )
        if self._ended:
            return False
        data = self._stream.read(max(_CHUNK, pending))
        self._ended = not data
        text = self._decode(data)
        if text:
            self._drop_used()
            self._text += text
        return bool(text) or not self._ended or self._bad_byte is not None

    def _decode(self, data: bytes) -> str:
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._bad_byte = error.object[error.start]
            return error.object[: error.start].decode()

    def _drop_used(self) -> None:
        self._line, self._column = self._where(self._pos)
        self._text = self._text[self._pos :]
        self._pos = self._counted = 0

    def _where(self, pos: int) -> tuple[int, int]:
        """1-based line and column of a position in the text."""
        newline = self._text.rfind("\n", 0, pos)
        column = pos - newline if newline >= 0 else self._column + pos
        return self._line + self._text.count("\n", self._counted, pos), column

    def _malformed(self, why: str, pos: int) -> _MalformedError:
        line, column = self._where(pos)
        return _MalformedError(f"malformed JSON at line {line}, column {column}: {why}")
