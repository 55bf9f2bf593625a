"""Rows of text files by line: JSON lines, plain text, CSV.

The text was decoded with `surrogateescape`: what is not UTF-8 is found here, row by row.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

MAX_ROW = 64 << 20  # characters; longer than any context, so something is never closed


@dataclass(frozen=True)
class Unreadable:
    """What a reader yields in the place of a value it can't read."""

    error: str
    fatal: bool = False
    """The rest of the file can't be read either."""


Found = tuple[int | None, Any]
"""What readers yield: the 1-based line where it starts, if there are lines, and the value or `Unreadable`."""


def not_utf8(text: str, line: int) -> Unreadable | None:
    """The complaint about a text that starts at `line`, if it holds bytes that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, error.start)
        byte = ord(text[error.start]) & 0xFF  # the surrogate stands for it
        return Unreadable(
            f"not valid UTF-8 at line {line}: byte 0x{byte:02x}; convert the file with:"
            " iconv -f ENCODING -t UTF-8 FILE > NEW_FILE (with ENCODING its own: CP1252 or GBK, say)"
        )
    return None


def txt_rows(text: TextIO) -> Iterator[Found]:
    """Each line that is not blank is a row."""
    for number, line in _lines(text):
        yield number, {"text": line} if isinstance(line, str) else line


def jsonl_rows(text: TextIO) -> Iterator[Found]:
    """Each line that is not blank is a JSON value."""
    for number, line in _lines(text):
        yield number, _parsed(line, number) if isinstance(line, str) else line


def csv_rows(text: TextIO) -> Iterator[Found]:
    """Rows as dicts of strings by the names in the header line."""
    records = _csv_records(text)
    line, header = next(records, (1, Unreadable("the CSV file has no header line")))
    if isinstance(header, Unreadable):
        yield line, Unreadable(header.error, fatal=True)
        return
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        yield line, Unreadable(f"the CSV header has the column '{twice[0]}' twice", fatal=True)
        return
    for line, cells in records:
        if isinstance(cells, Unreadable):
            yield line, cells
        elif len(cells) != len(header):
            counts = f"{len(cells)} cells, the header has {len(header)}"
            yield line, Unreadable(f"the row at line {line} has {counts} (a comma outside quotes?)")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _lines(text: TextIO) -> Iterator[tuple[int, str | Unreadable]]:
    """The lines that are not blank, without their ends."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_ROW + 1), ""), 1):
        if len(line) > MAX_ROW:
            error = f"line {number} is longer than {MAX_ROW >> 20} MiB: is it really one row?"
            yield number, Unreadable(error, fatal=True)
            return
        if line.strip():
            yield number, not_utf8(line, number) or line.rstrip("\r\n")


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (an array over several lines? name the file .json)" if text.lstrip().startswith("[") else ""
        return Unreadable(f"malformed JSON at line {line}, column {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        return Unreadable(f"malformed JSON at line {line}: {error}")


def _csv_records(text: TextIO) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """Header and rows, each with the line where it starts; blank lines are left out."""
    # a quote that is never closed makes one cell of the rest of the file
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(text, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            endless = re.search("field larger|end of data", str(error)) is not None
            hint = " (a quote that is never closed?)" if endless else ""
            yield line, Unreadable(f"malformed CSV at line {line}: {error}{hint}", fatal=endless)
            continue
        if cells:
            yield line, not_utf8("".join(cells), line) or cells
