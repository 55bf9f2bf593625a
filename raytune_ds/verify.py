"""Proof, from what a run left behind, that it was trained on each row of each epoch exactly once.

metrics.jsonl has a fingerprint of every step's batch, made of what the ranks really read. The prepared store, seed and
step say which it must be. Whatever was killed and restarted, and on however many workers, does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ds import storage
from raytune_ds.console import err, say, table
from raytune_ds.data import batchid
from raytune_ds.data.store import Store
from raytune_ds.errors import UserError
from raytune_ds.trained import Trained

SHOWN = 10


def verify(paths: Sequence[str]) -> int:
    """Says of each run whether it was trained on what it should have been; returns the exit code, 0 or 2."""
    code = 0
    for path in paths:
        try:
            report = examine(Trained.read(path))
        except UserError as error:
            err.print(f"error: {error}", style="red", markup=False)
            code = 2
            continue
        _print(path, report)
        code = max(code, 2 if report.problems else 0)
    return code


# ---------------------------------------------------------------------------------------------- the store


class Packs:
    """Which rows each pack of a store has, in little memory."""

    def __init__(self, store: Store) -> None:
        """Reads all row ids of the training split once.

        Raises:
            UserError: the store is damaged.
        """
        self._store = store
        hashes, sizes, rows = [], [], []
        try:
            for docs in _docs(store):
                hashes.append(batchid.pack_hash(docs))
                sizes.append(len(docs))
                rows.append(np.unique(docs))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{store.path}: can't be read: {error}") from error
        self.hashes, self.sizes = hashes, np.array(sizes, np.int64)
        self.num_rows = len(np.unique(np.concatenate(rows))) if rows else 0

    @property
    def num_docs(self) -> int:
        """Documents in all packs."""
        return int(self.sizes.sum())

    @cached_property
    def change(self) -> str | None:
        """How the store differs from what its manifest says; None if it does not."""
        split = self._store.manifest.train
        there = (len(self.hashes), self.num_docs)
        if there == (split.num_packs, split.num_docs):
            return None
        return (
            f"{self._store.path} has changed: {there[0]} packs of {there[1]} documents, and its manifest says "
            f"{split.num_packs} of {split.num_docs}"
        )


def _docs(store: Store) -> Iterator[np.ndarray]:
    """The row ids of each pack, in the store's order."""
    for shard, _ in store.manifest.train.shards:
        with storage.open_file(f"{store.path}/{shard}") as handle, pq.ParquetFile(handle) as file:
            for batch in file.iter_batches(columns=["docs"]):
                column = batch.column(0)
                values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
                yield from np.split(values[offsets[0] : offsets[-1]], offsets[1:-1] - offsets[0])


# --------------------------------------------------------------------------------------------- the steps


@dataclass
class Epoch:
    """What became of one epoch.

    Attributes:
        number: from 1.
        first, last: its steps.
        done: the last of them that the run has come to.
        trained: documents that an update was made from, exactly once.
        passed_over: documents of steps that were skipped or left out.
        is_right: whether every document was trained on or passed over exactly once, as far as the run has come.
    """

    number: int
    first: int
    last: int
    done: int
    trained: int
    passed_over: int
    is_right: bool


@dataclass
class Report:
    """What was found of a run.

    Attributes:
        steps: that the run has come to.
        total_steps: that it is to come to.
        num_docs, num_rows: of its training data.
        workers: how many there were, one after the other.
        epochs: that were begun.
        problems: what differs, a line each; none if all is proved.
        notes: what else should be known.
    """

    steps: int
    total_steps: int
    num_docs: int
    num_rows: int
    workers: list[int]
    epochs: list[Epoch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(trained: Trained) -> Report:
    """Holds every step of a run against the store.

    Raises:
        UserError: the store can't be read.
    """
    packs = Packs(trained.store)
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in trained.rows:
        by_step[row["step"]].append(row)
    report = Report(
        steps=max(by_step, default=0),
        total_steps=trained.total_steps,
        num_docs=packs.num_docs,
        num_rows=packs.num_rows,
        workers=[
            size for size, _ in groupby(row["world_size"] for row in trained.rows if "world_size" in row)
        ],
    )
    report.problems += _changes(trained)
    if packs.change is not None:
        report.problems.append(packs.change)
        return report
    steps = _Steps(trained, packs, by_step)
    report.problems += steps.problems(max(report.steps, trained.known_steps))
    report.notes += _notes(by_step)
    report.epochs = list(steps.epochs(report.steps))
    wrong = [epoch.number for epoch in report.epochs if not epoch.is_right]
    if wrong and not report.problems:  # the order itself is at fault
        report.problems.append(f"documents of epoch {wrong[0]} were trained on more or less than once")
    return report


def _changes(trained: Trained) -> Iterator[str]:
    """What config.json says otherwise than the checkpoint that was made with it."""
    config, identity = trained.config, trained.identity
    for key, now, then in (
        ("run.seed", config.run.seed, identity.get("run.seed")),
        ("train.global_batch", config.train.global_batch, identity.get("train", {}).get("global_batch")),
    ):
        if then is not None and then != now:
            yield f"config.json has {key} = {now}, and the run was trained with {then}"


def _notes(by_step: Mapping[int, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for key, what in (
        ("skipped", "read, but not applied (see train.max_skipped_steps)"),
        ("left_out", "left out (train.on_skipped_steps = rewind)"),
    ):
        if steps := [step for step, rows in sorted(by_step.items()) if any(row.get(key) for row in rows)]:
            yield f"{len(steps)} steps were {what}: {_ranges(steps)}"


class _Steps:
    """The steps of a run, beside what they should be."""

    def __init__(
        self, trained: Trained, packs: Packs, by_step: Mapping[int, Sequence[Mapping[str, Any]]]
    ) -> None:
        self._order, self._packs, self._by_step = trained.order, packs, by_step

    @cached_property
    def _expected(self) -> dict[int, str]:
        """The fingerprint of each step."""
        return {step: self._fingerprint(step) for step in self._by_step}

    def _fingerprint(self, step: int) -> str:
        hashes = {slot: self._packs.hashes[pack] for slot, pack in self._positions(step).items()}
        return batchid.text(batchid.total(hashes))

    def _positions(self, step: int) -> dict[int, int]:
        """The packs of a step by slot."""
        places = ((slot, self._order.place(step - 1, slot)) for slot in range(self._order.global_batch))
        size = self._order.row_group_size
        return {slot: place.row_group * size + place.row for slot, place in places if place is not None}

    def problems(self, last: int) -> Iterator[str]:
        """What differs in steps 1 to `last`, a line each."""
        missing = [step for step in range(1, last + 1) if step not in self._by_step]
        doubled = [step for step, rows in sorted(self._by_step.items()) if len(rows) > 1]
        if missing:
            yield f"not in metrics.jsonl: steps {_ranges(missing)}"
        if doubled:
            yield f"more than once in metrics.jsonl: steps {_ranges(doubled)}"
        if unknown := [step for step in sorted(self._by_step) if self._is_unknown(step)]:
            yield (
                f"steps {_ranges(unknown)} have no fingerprint of their batch, as an older version of raytune_ds "
                "trained them: which rows they were trained on can't be proved"
            )
        steps = {batch: step for step, batch in self._expected.items()}
        wrong = [(step, other) for step in sorted(self._by_step) if (other := self._other_batch(step))]
        for step, found in wrong[:SHOWN]:
            other = f", which is that of step {steps[found]}" if found in steps else ""
            yield f"step {step}: expected batch {self._expected[step]}, found {found}{other}"
        if len(wrong) > SHOWN:
            yield f"... and {len(wrong) - SHOWN} more steps with another batch"
        if wrong and len(wrong) == len(self._by_step):
            yield "no batch is as expected: seed, train.global_batch or the prepared data are not those of the run"

    def _is_unknown(self, step: int) -> bool:
        return any("batch" not in row and "left_out" not in row for row in self._by_step[step])

    def _other_batch(self, step: int) -> str | None:
        """What a step was trained on in place of its own batch."""
        found = (row["batch"] for row in self._by_step[step] if "batch" in row)
        return next((batch for batch in found if batch != self._expected[step]), None)

    def epochs(self, last: int) -> Iterator[Epoch]:
        """What became of each epoch up to step `last`."""
        length = self._order.steps_per_epoch
        for number in range(-(-last // length)):
            yield self._epoch(number, number * length + 1, (number + 1) * length, last)

    def _epoch(self, number: int, first: int, last: int, run_to: int) -> Epoch:
        sizes = self._packs.sizes
        trained, passed_over = np.zeros(len(sizes), np.int32), np.zeros(len(sizes), np.int32)
        due = np.zeros(len(sizes), np.int32)
        done = min(last, run_to)
        for step in range(first, done + 1):
            packs = list(self._positions(step).values())
            np.add.at(due, packs, 1)
            for row in self._by_step.get(step, ()):
                if "left_out" in row or row.get("skipped"):
                    np.add.at(passed_over, packs, 1)
                elif row.get("batch") == self._expected[step]:
                    np.add.at(trained, packs, 1)
        whole = done == last
        is_right = bool(np.all(trained + passed_over == (1 if whole else due)) and np.all(due <= 1))
        return Epoch(
            number=number + 1,
            first=first,
            last=last,
            done=done,
            trained=int(sizes[trained == 1].sum()),
            passed_over=int(sizes[passed_over > 0].sum()),
            is_right=is_right,
        )


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3 and 7 as '1 to 3, 7'; long lists are cut."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}")
    return ", ".join(parts[:SHOWN]) + (", ..." if len(parts) > SHOWN else "")


# ------------------------------------------------------------------------------------------- what is said


def _print(path: str, report: Report) -> None:
    workers = f" on {', then '.join(map(str, report.workers))} worker(s)" if report.workers else ""
    say(f"{path}: step {report.steps} of {report.total_steps}{workers}", style="bold")
    if report.epochs:
        table("", ["epoch", "steps", "documents", "trained on"], list(_lines(report)))
    for note in report.notes:
        say(note)
    for problem in report.problems:
        say(problem, style="red")
    say(_verdict(report), style="red" if report.problems else "green")


def _lines(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """A line for each stretch of epochs of which the same is to be said."""

    def said(epoch: Epoch) -> tuple[str, str]:
        counts = f"{epoch.trained:,} of {report.num_docs:,}"
        if not epoch.is_right:
            return counts, "NOT proved"
        parts = ["each once"]
        if epoch.passed_over:
            parts.append(f"{epoch.passed_over:,} in steps not applied")
        if epoch.done < epoch.last:
            parts.append(f"partial: {epoch.done - epoch.first + 1} of {epoch.last - epoch.first + 1} steps")
        return counts, "; ".join(parts)

    for (counts, text), group in groupby(report.epochs, key=said):
        epochs = list(group)
        first, last = epochs[0], epochs[-1]
        number = f"{first.number}" if first is last else f"{first.number} to {last.number}"
        yield number, f"{first.first} to {last.done}", counts, text


def _verdict(report: Report) -> str:
    if report.problems:
        return "NOT proved: see above"
    if not report.steps:
        return "nothing was trained yet"
    whole = sum(epoch.done == epoch.last for epoch in report.epochs)
    passed_over = any(epoch.passed_over for epoch in report.epochs)
    rows = f"the {report.num_rows:,} rows" + (
        f" ({report.num_docs:,} documents)" if report.num_docs != report.num_rows else ""
    )
    epochs = f"in each of {whole} whole epochs" if whole > 1 else "in the one whole epoch"
    parts = [f"every step once, each on the batch that seed and step say; {rows} exactly once {epochs}"]
    if not whole:
        parts = ["every step once, each on the batch that seed and step say; no row more than once"]
    if whole and whole < len(report.epochs):
        parts.append("no row more than once in the partial one")
    if passed_over:
        parts.append("but for those of the steps not applied")
    return f"proved: {', '.join(parts)}"
