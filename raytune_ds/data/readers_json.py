"""Rows of a JSON file that is not made of lines, however large: it is decoded value by value."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

from raytune_ds.data.readers_lines import MAX_ROW, Found, Unreadable, not_utf8

CHUNK = 1 << 20  # characters a read

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
# an object that holds the rows under a key, scalars at most before it: {"version": "1.0", "data": [{...
_WRAPPER = re.compile(
    r'\s*\{\s*(?:"\w*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,\s*)*'
    r'"(?:data|rows|train|examples|instances)"\s*:\s*(?=\[\s*\{)'
)
_WRAPPER_CHARS = 1 << 16
# how far before the end of a cut text raw_decode may stumble over the cut; the longest piece of JSON that is
# no string is '-Infinity', the longest escape in one '\ud83d\ude00'
_CUT_MARGIN = 16


def is_json_lines(head: str) -> bool:
    """Whether a file that begins like this holds one object a line, whatever its name says."""
    first_line = head.lstrip().partition("\n")[0].rstrip()
    whole = first_line.endswith("}") or "\n" not in head
    return first_line.startswith("{") and whole and not _WRAPPER.match(head, 0, _WRAPPER_CHARS)


def json_rows(text: TextIO) -> Iterator[Found]:
    """Rows of an array, of the array in an object, or of objects one after the other."""
    window = _Window(text)
    try:
        wrapped = window.accept_wrapper()
        if wrapped or window.next_char() != "{":
            yield from _array_rows(window)
        else:
            while window.next_char():
                yield window.value()
        if wrapped:
            _skip_members(window)
        window.expect("", "something follows the end of the rows")
    except _MalformedError as error:
        yield window.line, Unreadable(str(error), fatal=True)


def _array_rows(window: "_Window") -> Iterator[Found]:
    window.expect("[", "expected a JSON array or objects")
    more = window.next_char() != "]"
    while more:
        yield window.value()
        more = window.accept(",")
    window.expect("]", "Expecting ',' delimiter")


def _skip_members(window: "_Window") -> None:
    """The rest of the object that held the rows; read, so that a file cut short does not pass for whole."""
    while window.accept(","):
        window.value()
        window.expect(":", "Expecting ':' delimiter")
        window.value()
    window.expect("}", "Expecting ',' delimiter")


class _MalformedError(Exception):
    """The JSON text can't be read on; the message says where and why."""


class _Window:
    """A piece of text that slides over a stream, and knows its line. Its methods raise _MalformedError."""

    def __init__(self, stream: TextIO) -> None:
        self.line = 1  # of what comes next
        self._stream = stream
        self._text = ""
        self._pos = 0  # what is before is used up

    def next_char(self) -> str:
        """The next character that is not space, not taken; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._pos)
            assert space is not None
            self._take(space.end())
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._grow():
                return ""

    def accept(self, char: str) -> bool:
        """Takes `char` if it is the next one that is not space."""
        found = self.next_char() == char
        self._take(self._pos + len(char) if found else self._pos)
        return found

    def accept_wrapper(self) -> bool:
        """Takes the beginning of an object that holds the rows under a key, if there is one."""
        self.next_char()
        wrapper = _WRAPPER.match(self._text, self._pos, self._pos + _WRAPPER_CHARS)
        self._take(wrapper.end() if wrapper else self._pos)
        return wrapper is not None

    def expect(self, char: str, otherwise: str) -> None:
        """Takes `char` (empty: the end) as the next one that is not space."""
        if not self.accept(char):
            raise self._malformed(otherwise, self._pos)

    def value(self) -> Found:
        """Takes the next JSON value."""
        self.next_char()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._pos)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._grow():
                    continue
                raise self._malformed(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._malformed(str(error), self._pos) from None
            # '12' at the end of the text may go on as '123'
            if end < len(self._text) or self._text[end - 1] in '}]"' or not self._grow():
                break
        line, raw = self.line, self._text[self._pos : end]
        self._take(end)
        return line, not_utf8(raw, line) or value

    def _take(self, end: int) -> None:
        self.line += self._text.count("\n", self._pos, end)
        self._pos = end

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        at_end = error.pos >= len(self._text) - _CUT_MARGIN
        return at_end or error.msg.startswith("Unterminated string")

    def _grow(self) -> bool:
        """Reads on; False at the end of the file, and then nothing has moved.

        Reads at least as much as is pending: what is decoded in vain adds up to no more than the row itself.
        """
        pending = len(self._text) - self._pos
        if pending > MAX_ROW:
            raise _MalformedError(
                f"the row that starts at line {self.line} is longer than {MAX_ROW >> 20} MiB: a bracket or"
                " quote that is never closed?"
            )
        text = self._stream.read(max(CHUNK, pending))
        if text:
            self._text = self._text[self._pos :] + text
            self._pos = 0
        return bool(text)

    def _malformed(self, why: str, pos: int) -> _MalformedError:
        line = self.line + self._text.count("\n", self._pos, pos)
        near = self._text[pos : pos + 20]
        what = f"found {near!r}" if near else "the file ends here (cut off?)"
        return _MalformedError(f"malformed JSON at line {line}: {why}, {what}")
