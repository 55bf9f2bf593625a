"""What the tasks of a preparation are told, and what each tells of its rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raytune_ds.data.inputs import Input
from raytune_ds.data.mixture import Source
from raytune_ds.data.sightings import Sightings
from raytune_ds.data.store import FILE_SHIFT
from raytune_ds.data.thinking import Thinking
from raytune_ds.data.tokenizer import TokenizerSpec


@dataclass(frozen=True)
class Job:
    """All that a task needs to know.

    Attributes:
        inputs, sources: of the run.
        tokenizer: of the model.
        seq_len, on_long_row, last_turn_only, thinking: of the config's data section.
        seed: of the shuffle and of what is held out.
        num_buckets: that rows are scattered over.
        chunk_chars: text of the rows of a chunk, in characters: what is encoded at once, and what a crash may cost.
        scratch: folder of what is only needed while the store is made.
        target: folder of the store.
    """

    inputs: tuple[Input, ...]
    sources: tuple[Source, ...]
    tokenizer: TokenizerSpec
    seq_len: int
    on_long_row: str
    last_turn_only: bool
    thinking: Thinking
    seed: int
    num_buckets: int
    chunk_chars: int
    scratch: str
    target: str

    @property
    def source_of_file(self) -> tuple[int, ...]:
        """For each input the index of its source."""
        return tuple(item.source.index for item in self.inputs)

    @property
    def text_bytes(self) -> int:
        """About how much text there is in all of it, in bytes."""
        return sum(item.text_bytes for item in self.inputs)

    def sources_of(self, docs: np.ndarray) -> np.ndarray:
        """Of rows by their ids, the index of the source of each."""
        return np.array(self.source_of_file)[docs >> FILE_SHIFT]

    @property
    def places(self) -> dict[str, Any]:
        """What a manifest says of where rows come from."""
        return {
            "files": tuple(item.file.path for item in self.inputs),
            "formats": {item.file.path: item.format for item in self.inputs},
            "sources": tuple(source.name for source in self.sources),
            "file_sources": self.source_of_file,
        }


@dataclass
class Tally:
    """What became of the rows of one chunk, or of all of them.

    Attributes:
        num_rows: read, bad ones included.
        num_bytes: of their text.
        num_truncated, num_dropped_long: conversations longer than a pack.
        num_split: raw texts longer than a pack.
        num_docs: sequences written to the buckets.
        usable: rows by source.
        lowest_eval_key: of them, by source.
        lengths: rows by the upper end of their bin of tokens, a power of two.
        sightings: what is odd about rows.
        turns: answers by what became of their reasoning; see thinking.
        num_rejected, reasons: the bad rows, and how many by why they are.
        rejected: those of one chunk: file, row, line, reason, fatal, where. They are not added up: there may be many.
        peak_memory_mib: of the task.
    """

    num_rows: int = 0
    num_bytes: int = 0
    num_truncated: int = 0
    num_dropped_long: int = 0
    num_split: int = 0
    num_docs: int = 0
    usable: Counter[int] = field(default_factory=Counter)
    lowest_eval_key: dict[int, int] = field(default_factory=dict)
    lengths: Counter[str] = field(default_factory=Counter)
    sightings: Sightings = field(default_factory=Sightings)
    turns: Counter[str] = field(default_factory=Counter)
    num_rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    peak_memory_mib: float = 0.0

    def add(self, other: Tally) -> None:
        """Takes in another chunk's tally."""
        self.num_rows += other.num_rows
        self.num_bytes += other.num_bytes
        self.num_truncated += other.num_truncated
        self.num_dropped_long += other.num_dropped_long
        self.num_split += other.num_split
        self.num_docs += other.num_docs
        for source, key in other.lowest_eval_key.items():
            self.lowest_eval_key[source] = min(self.lowest_eval_key.get(source, key), key)
        self.usable.update(other.usable)
        self.lengths.update(other.lengths)
        self.sightings.add(other.sightings)
        self.turns.update(other.turns)
        self.num_rejected += other.num_rejected
        self.reasons.update(other.reasons)
        self.peak_memory_mib = max(self.peak_memory_mib, other.peak_memory_mib)

    def note_usable(self, source: int, eval_key: int) -> None:
        """A row of a source that may be held out."""
        self.usable[source] += 1
        self.lowest_eval_key[source] = min(self.lowest_eval_key.get(source, eval_key), eval_key)

    def to_json(self) -> str:
        """As it lies in a chunk's file."""
        return json.dumps({**vars(self), "sightings": vars(self.sightings)})

    @staticmethod
    def from_json(text: str) -> Tally:
        """The way back from `to_json`."""
        values = json.loads(text)
        values["usable"] = Counter({int(s): count for s, count in values["usable"].items()})
        values["lowest_eval_key"] = {int(s): key for s, key in values["lowest_eval_key"].items()}
        for name in ("lengths", "turns", "reasons"):
            values[name] = Counter(values[name])
        values["sightings"] = Sightings(**values["sightings"])
        return Tally(**values)
