"""Which files a run reads, the format of their rows, and a hash of their content."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import xxhash

from raytune_ds import hub, storage
from raytune_ds.config import DataConfig, SourceConfig
from raytune_ds.data.formats import FORMATS, Example, RowError, detect, to_example
from raytune_ds.data.mixture import Source, named
from raytune_ds.data.readers import Row, read_rows
from raytune_ds.data.sources import SourceFile, expand
from raytune_ds.errors import UserError

ROWS_FOR_DETECTION = 100
TRAINS_ON: dict[str, tuple[str, ...]] = {
    "sft": ("messages", "sharegpt", "alpaca", "prompt-completion", "text"),
    "pretrain": ("text",),
}
"""By `objective.kind`: the formats of the rows it takes."""
FOR_NO_OBJECTIVE = frozenset(FORMATS).difference(*TRAINS_ON.values())
"""Formats whose rows can be prepared and looked at, and no objective trains on yet."""
_JUDGED = {
    "preference": "preference rows (a chosen and a rejected answer each)",
    "kto": "KTO rows (an answer and whether it is desirable each)",
}
# Guesses, on the safe side: they only decide how many buckets the preparation makes.
COMPRESSION = 6
HUB_TEXT_BYTES = 2 << 30
ROW_BYTES = 4096
SAMPLE_CHARS = 4_000_000
_CHUNK = 4 << 20


@dataclass(frozen=True)
class Input:
    """One source file and how its rows are read."""

    file: SourceFile
    format: str
    source: Source
    max_rows: int | None = None
    """Read from its beginning; None: all."""

    @property
    def held_out(self) -> bool:
        """Whether it is measured on and never trained on."""
        return self.source.held_out

    def rows(self) -> Iterator[Row]:
        """The rows that are read."""
        return islice(read_rows(self.file), self.max_rows)

    @property
    def text_bytes(self) -> int:
        """About how much text is in it, in bytes."""
        packed = self.file.container == "parquet" or self.file.path.endswith((".gz", ".bz2", ".zst"))
        whole = self.file.size * (COMPRESSION if packed else 1)
        guess = HUB_TEXT_BYTES if self.file.container == "hub" else whole
        return guess if self.max_rows is None else min(guess, self.max_rows * ROW_BYTES)


@dataclass(frozen=True)
class Inputs:
    """All files of a run, in a fixed order."""

    items: tuple[Input, ...]
    sources: tuple[Source, ...] = ()

    @staticmethod
    def find(config: DataConfig) -> Inputs:
        """Expands all sources and finds the format of their rows.

        Raises:
            UserError: a source is missing or empty, or its format can't be told.
        """
        given = [(source, False) for source in config.sources or ()]
        given += [(source, True) for source in config.eval.sources or ()]
        sources, items = named(given), []
        for source, (settings, _) in zip(sources, given, strict=True):
            files = expand(settings.path, settings.subset, settings.split or "train")
            row_format = _format_of(settings, files[0])
            limits = _limits(files, settings.max_rows)
            items += [Input(file, row_format, source, limit) for file, limit in limits]
        return Inputs(tuple(items), sources)

    def require_formats_of(self, objective: str, to_train: bool = True) -> None:
        """Whether the objective takes these rows; `objective` is a key of TRAINS_ON.

        Not `to_train`, rows of FOR_NO_OBJECTIVE may be there too.

        Raises:
            UserError: it does not take those of a source.
        """
        taken = {*TRAINS_ON[objective], *(() if to_train else FOR_NO_OBJECTIVE)}
        refused = [item for item in self.items if item.format not in taken]
        if refused:
            raise UserError(_refusal(objective, refused))

    def summary(self) -> list[str]:
        """A line a source."""
        sources = Counter((item.source, item.format) for item in self.items)
        return [
            f"{source.path}: {row_format} rows{f' in {files} files' * (files > 1)}{', all held out' * source.held_out}"
            for (source, row_format), files in sources.items()
        ]

    @property
    def text_bytes(self) -> int:
        """About how much text is in all files, in bytes."""
        return sum(item.text_bytes for item in self.items)

    @property
    def has_conversations(self) -> bool:
        """Whether a chat template is needed."""
        return any(item.format != "text" for item in self.items)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """A hash of each file's content. Where the files lie does not matter, nor when they were touched."""
        with ThreadPoolExecutor(4) as pool:
            return tuple(pool.map(lambda item: _content_hash(item.file), self.items))

    def sample_texts(self) -> Iterator[str]:
        """Texts from the beginning of each file, some millions of characters in all; bad rows are left out."""
        for item in self.items:
            left = SAMPLE_CHARS // len(self.items)
            for row in item.rows():
                for text in _texts(row, item.format):
                    yield text[: max(0, left)]
                    left -= len(text)
                if left <= 0:
                    break


def _refusal(objective: str, refused: list[Input]) -> str:
    """That the objective does not take these files, and what to do."""
    named = dict.fromkeys(
        f"data.{'eval.' * item.held_out}sources: {item.source.path} has "
        + _JUDGED.get(item.format, f"{item.format} rows")
        for item in refused
    )
    lines = [
        f"objective.kind = {objective} trains on {' and '.join(TRAINS_ON[objective])} rows only.",
        *named,
    ]
    if any(item.format not in FOR_NO_OBJECTIVE for item in refused):
        lines.append("To train on the answers, set objective.kind=sft.")
    if judged := [item for item in refused if item.format in FOR_NO_OBJECTIVE]:
        lines.append(
            "No objective trains on such rows yet; sft trains on demonstrations (a prompt and the one answer to learn),"
            " pretrain on raw text. To train on one of their columns all the same, name its format:"
            f" {{path: {judged[0].source.path}, format: messages}} where it is 'messages'."
        )
    if objective == "pretrain":
        lines.append(
            "For raw text name .txt files, or rows with a 'text' column; where these have other columns too, write"
            f" {{path: {refused[0].source.path}, format: text}}."
        )
    return "\n".join(lines)


def _format_of(source: SourceConfig, file: SourceFile) -> str:
    if source.format != "auto":
        return source.format
    first = list(islice(read_rows(file), ROWS_FOR_DETECTION))
    rows = [row.value for row in first if row.value is not None]
    if not rows:
        raise UserError(
            f"{where(file, first[0])}: {first[0].error}" if first else f"{file.path}: no row in it"
        )
    try:
        return detect(rows)
    except RowError as error:
        raise UserError(f"{file.path}: {error}") from error


def _limits(files: Sequence[SourceFile], most: int | None) -> Iterator[tuple[SourceFile, int | None]]:
    """The files that the first `most` rows of all lie in, each with how many of its rows are among them."""
    for number, file in enumerate(files):
        is_last = number == len(files) - 1
        if most is None or is_last:
            yield file, most
            continue
        count = sum(1 for _ in islice(read_rows(file), most))
        yield file, count
        most -= count
        if most == 0:
            return


def _content_hash(file: SourceFile) -> str:
    if file.container == "hub":
        return hub.check_dataset(file.path)
    digest = xxhash.xxh3_128()
    filesystem, inner = storage.open_filesystem(file.path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _texts(row: Row, row_format: str) -> list[str]:
    try:
        example = to_example(row.value, row_format) if row.value is not None else Example()
    except RowError:
        return []
    if example.text is not None:
        return [example.text]
    messages = list(example.messages)
    if example.rejected is not None:  # the prompt has been taken
        messages += [message for message in example.rejected.messages if message not in messages]
    return [m.get("content") or json.dumps(m.get("tool_calls"), ensure_ascii=False) for m in messages]


def where(file: SourceFile, row: Row) -> str:
    """A row's place in words."""
    line = f", line {row.line}" if row.line else ""
    return f"{file.path}, row {row.index + 1}{line}"
