"""What is measured on: the run's own held-out split, and files of any format; rows to items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from raytune_ds.config import Config, DataConfig
from raytune_ds.data.fit import fit
from raytune_ds.data.formats import Example, Message, RowError, to_example
from raytune_ds.data.inputs import Input, Inputs, where
from raytune_ds.data.job import Tally
from raytune_ds.data.order import Place
from raytune_ds.data.store import Store, file_and_row
from raytune_ds.data.template import Encoded, Encoder
from raytune_ds.data.thinking import part
from raytune_ds.errors import UserError
from raytune_ds.evaluation.items import Item, TokenSequence

HELD_OUT = "held-out split"
"""The name of the run's own."""
SPARE_TOKENS = 16
"""That an answer may be longer than the longest expected one of its data set."""

Role = Literal["held-out", "data", "general"]


@dataclass
class DataSet:
    """Rows that are measured together.

    Attributes:
        name: of its file.
        role: `general` is what a model should not have forgotten.
        path: where it was read from.
        fingerprint: of its content.
        items: its rows.
        places: where each of them stands.
        prompts: the messages that each answer is to; none where no answer is asked.
        unfit: why each row is not among them that could not be rendered.
        ends: tokens that end an answer.
    """

    name: str
    role: Role
    path: str
    fingerprint: str
    items: list[Item] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    prompts: list[Sequence[Message]] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)


# --------------------------------------------------------------------------------------- the held-out split


def held_out(store: Store, limit: int | None) -> DataSet:
    """The rows that the run was measured on and not trained on: their losses, a row's documents together."""
    found: dict[int, list[TokenSequence]] = {}
    for doc, sequence in _documents(store):
        if doc not in found and len(found) == limit:
            continue
        found.setdefault(doc, []).append(sequence)
    data = DataSet(HELD_OUT, "held-out", store.path, store.manifest.fingerprint)
    for doc, sequences in found.items():
        file, row = file_and_row(doc)
        data.items.append(Item(sequences))
        data.places.append(f"{store.manifest.files[file]}, row {row + 1}")
        data.prompts.append(())
    return data


def _documents(store: Store) -> Iterator[tuple[int, TokenSequence]]:
    """Each document and the row that it came from; its tokens as they were before the shift by one."""
    reader = store.reader("eval")
    for position in range(store.manifest.eval.num_packs):
        pack = reader.pack(Place(*divmod(position, store.manifest.row_group)))
        ends = np.cumsum(pack["lengths"])
        for doc, end, length in zip(pack["docs"].tolist(), ends, pack["lengths"], strict=True):
            span = slice(end - length, end)
            ids = [*pack["ids"][span].tolist(), int(pack["targets"][end - 1])]
            yield doc, TokenSequence(ids, [0.0, *pack["weights"][span].tolist()])


# --------------------------------------------------------------------------------------------------- files


def from_file(
    path: str, role: Role, config: Config, tokenizer: Any, limit: int | None, max_new_tokens: int | None
) -> DataSet:
    """The rows of a file, folder or data set, in the format that they have, rendered as the run's own data were.

    Args:
        path: as data.sources takes it.
        role: in the evaluation.
        config: of the run.
        tokenizer: of the trained model.
        limit: read the first rows only.
        max_new_tokens: the longest answer; None: SPARE_TOKENS more than the longest expected one.

    Raises:
        UserError: there is no such file, a row is bad and data.on_bad_row is fail, or no row can be used.
    """
    inputs = Inputs.find(DataConfig.model_validate({"sources": [{"path": path, "max_rows": limit}]}))
    if inputs.has_conversations and not tokenizer.chat_template:
        raise UserError(
            f"{path}: has conversations, and the trained model's tokenizer has no chat template to render them."
        )
    data = DataSet(_file_name(path), role, path, "+".join(inputs.contents))
    reader = _Reader(data, config.data, tokenizer)
    for item in inputs.items:
        reader.read(item)
    if not data.items:
        why = f": {data.unfit[0]}" if data.unfit else " in it"
        raise UserError(f"{path}: there is no row that can be measured{why}")
    longest = max_new_tokens or max((i.max_new_tokens for i in data.items), default=0) + SPARE_TOKENS
    data.items = [replace(item, max_new_tokens=longest if item.prompt else 0) for item in data.items]
    return data


def _file_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


class _Reader:
    """Fills a data set from files."""

    CHUNK = 256
    """Rows that are tokenized together."""

    def __init__(self, data: DataSet, config: DataConfig, tokenizer: Any) -> None:
        self._data, self._config, self._tokenizer = data, config, tokenizer
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._encoder = Encoder(tokenizer, config.supervise == "last-turn", config.thinking)

    def read(self, source: Input) -> None:
        rows = self._examples(source)
        while chunk := list(islice(rows, self.CHUNK)):
            encoded = self._encoder.encode_all([example for _, example in chunk])
            for (place, example), sequences in zip(chunk, encoded, strict=True):
                try:
                    self._add(place, example, sequences)
                except RowError as error:
                    self._data.unfit.append(f"{place}: {error}")

    def _examples(self, source: Input) -> Iterator[tuple[str, Example]]:
        for row in source.rows():
            place = where(source.file, row)
            try:
                if row.value is None:
                    raise RowError(row.error or "it can't be read")
                example = to_example(row.value, source.format)
                if example.desirable is False:
                    raise RowError("its answer is not desirable, so there is nothing to compare with")
            except RowError as error:
                if self._config.on_bad_row == "fail" or row.fatal:
                    raise UserError(
                        f"{place}: {error}\nMend or remove the row (of a run with data.on_bad_row=skip it is left out)."
                    ) from error
                self._data.unfit.append(f"{place}: {error}")
                continue
            yield place, replace(example, rejected=None, desirable=None)

    def _add(self, place: str, example: Example, sequences: list[Encoded] | RowError) -> None:
        if isinstance(sequences, RowError):
            raise sequences
        fitting = fit(sequences, self._config, Tally(), raw_text=example.text is not None)
        if not fitting:
            raise RowError(f"nothing that is trained on is left within data.seq_len = {self._config.seq_len}")
        item = Item([TokenSequence(sequence.ids, sequence.weights) for sequence in fitting])
        expected = part(example.messages[-1]).bare.get("content") or "" if example.messages else ""
        if expected.strip():
            item = self._asked(item, sequences[-1], expected)
        self._data.items.append(item)
        self._data.places.append(place)
        self._data.prompts.append(example.messages[:-1] if item.prompt else ())

    def _asked(self, item: Item, last: Encoded, expected: str) -> Item:
        """The prompt is what stands before the last turn in training, token for token."""
        start = max(place for place, weight in enumerate(last.weights) if not weight) + 1
        if last.ids[-1] in self._special:
            self._data.ends.add(last.ids[-1])
        length = len(last.ids) - start
        return replace(item, prompt=last.ids[:start], expected=expected, max_new_tokens=length)
