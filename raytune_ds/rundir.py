"""The run directory: an interface that people's scripts and other tools read.

config.json      the resolved config
metrics.jsonl    one line per optimizer step, one per evaluation
checkpoints/     step-00000120/ ...
profile/         where the time of a few steps went, where train.profile asks for it
initial/         what the adapter began with, where that was not drawn
final/           the adapter, or the model
result.json      how it ended
evaluation.json  how good it is, once it was evaluated; evaluation/answers.jsonl has the answers
memory.json      how much is computed at once, and what it was decided for
ds_config.json   what DeepSpeed was really given, where it was the engine
driver.json      who runs it, while it runs
hangs/           the stacks of workers that stopped answering
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ds import storage
from raytune_ds.errors import UserError
from raytune_ds.storage import finite


@dataclass(frozen=True)
class RunDir:
    """Paths of one run, on any filesystem pyarrow opens."""

    path: str

    @staticmethod
    def finished(path: str) -> tuple[RunDir, dict[str, Any]]:
        """A finished run, anywhere, and its config, as --run names it.

        Raises:
            UserError: it is none.
        """
        run = RunDir(storage.absolute(path))
        config = storage.read_json(run.config)
        if config is None:
            raise UserError(f"--run {path}: no run directory (it has no config.json).")
        if not storage.exists(run.final):
            raise UserError(
                f"--run {path}: the run has not finished (no final/). Start the same command again to go on."
            )
        return run, config

    @staticmethod
    def of_final(final: str) -> tuple[RunDir, dict[str, Any]] | None:
        """The run whose final/ a folder is, and its config; None where it is nobody's, or was taken elsewhere."""
        run = RunDir(storage.absolute(final).rstrip("/").rpartition("/")[0])
        if storage.absolute(final).rstrip("/") != run.final:
            return None
        config = storage.read_json(run.config)
        return (run, config) if isinstance(config, dict) and "model" in config else None

    @property
    def name(self) -> str:
        """Of the run."""
        return self.path.rpartition("/")[2]

    @property
    def config(self) -> str:
        """The resolved config."""
        return f"{self.path}/config.json"

    @property
    def metrics(self) -> str:
        """Metrics, a JSON object a line."""
        return f"{self.path}/metrics.jsonl"

    @property
    def checkpoints(self) -> str:
        """The folder of all checkpoints."""
        return f"{self.path}/checkpoints"

    @property
    def final(self) -> str:
        """What the user takes home."""
        return f"{self.path}/final"

    @property
    def initial(self) -> str:
        """What the adapter began with, where that was not drawn."""
        return f"{self.path}/initial"

    @property
    def result(self) -> str:
        """How it ended."""
        return f"{self.path}/result.json"

    @property
    def driver(self) -> str:
        """Who runs it."""
        return f"{self.path}/driver.json"

    @property
    def is_new(self) -> bool:
        """Whether there is nothing of it but, perhaps, a driver that has not come far."""
        return not set(storage.list_names(self.path)) - {"driver.json"}

    @property
    def ds_config(self) -> str:
        """What DeepSpeed was really given."""
        return f"{self.path}/ds_config.json"

    @property
    def memory(self) -> str:
        """How much is computed at once, and what it was decided for."""
        return f"{self.path}/memory.json"

    @property
    def hangs(self) -> str:
        """The folder of the stacks of workers that hung, a folder each time."""
        return f"{self.path}/hangs"

    @property
    def profile(self) -> str:
        """The folder of `train.profile`: summary.md, and a trace of each rank."""
        return f"{self.path}/profile"

    @property
    def tensorboard(self) -> str:
        """TensorBoard's log directory."""
        return f"{self.path}/tensorboard"

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, in order; none if there is no such file."""
        if not storage.exists(self.metrics):
            return []
        return parse_lines(storage.read_bytes(self.metrics))


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """JSON lines; a last line that a dying process left half written is passed over."""
    lines = content.split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def to_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as they stand in metrics.jsonl; a number that JSON does not have (the loss of a skipped step) as null."""
    return b"".join((json.dumps(finite(dict(row)), allow_nan=False) + "\n").encode() for row in rows)


class MetricsFile:
    """Appends to metrics.jsonl, each step in it once, also after a restart.

    A file tree is appended to. Object stores can't append: there the file is written anew whenever `flush` is called.
    """

    def __init__(self, run: RunDir, last_step: int, warn: Callable[[str], None]) -> None:
        """Keeps the lines up to `last_step` and drops those of steps that will be done again.

        `warn` hears of it when lines can't be written.
        """
        self._path, self._warn = run.metrics, warn
        there = storage.read_bytes(self._path) if storage.exists(self._path) else b""
        self._content = to_lines(row for row in parse_lines(there) if row["step"] <= last_step)
        if not there or self._content != there:  # what is right already must not fail on a full disk
            storage.write_bytes(self._path, self._content)
        local = storage.is_local(self._path)
        file = Path(storage.absolute(self._path))
        self._file = file.open("ab", buffering=0) if local else None
        self._pending, self._behind = b"", False

    def write(self, row: dict[str, Any]) -> None:
        """One line. While the disk is full lines are kept in memory; training is worth more than they are."""
        if self._file is None:
            self._content += to_lines([row])
            return
        self._pending += to_lines([row])
        self._drain()

    def _drain(self) -> None:
        assert self._file is not None
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self._fall_behind(error)
        else:
            self._behind = False

    def _fall_behind(self, error: OSError) -> None:
        if not self._behind:
            reason = error.strerror or error
            self._warn(f"{self._path} can't be written ({reason}); its lines are kept until it can")
        self._behind = True

    def flush(self) -> None:
        """Makes all lines so far visible to others."""
        if self._file is not None:
            self._drain()
            return
        try:
            storage.write_bytes(self._path, self._content)
            self._behind = False
        except OSError as error:
            self._fall_behind(error)

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        if self._file is not None:
            self._file.close()
