"""All that was decided in a sweep, in order; what searcher and scheduler know is made anew from it after a crash.

One JSON object a line: a trial and its values; a report and what the scheduler made of it; how a trial ended; and one
for each launch of the sweep.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raytune_ds import storage
from raytune_ds.rundir import parse_lines
from raytune_ds.storage import finite
from raytune_ds.sweep.records import Report, Status, Trial

Event = dict[str, Any]


class Journal:
    """The journal of one sweep; one process at a time writes it."""

    def __init__(self, path: str) -> None:
        """Reads what is there; a last line that a dying process left half written is dropped."""
        self._path = path
        there = storage.read_bytes(path) if storage.exists(path) else b""
        self.events: list[Event] = parse_lines(there)
        self._content = there[: there.rfind(b"\n") + 1]
        if self._content != there:
            storage.write_bytes(path, self._content)
        self._trials: dict[int, Trial] = {}
        for event in self.events:
            self._apply(event)

    @property
    def trials(self) -> list[Trial]:
        """All trials as they stand, in the order they were suggested."""
        return list(self._trials.values())

    def trial(self, number: int) -> Trial:
        """One of them."""
        return self._trials[number]

    def find(self, number: int) -> Trial | None:
        """One of them, if it is there."""
        return self._trials.get(number)

    def first_values(self, number: int) -> dict[str, Any]:
        """The values that a trial was begun with."""
        return dict(next(self._of("trial", number))["values"])

    @property
    def hours_before(self) -> float:
        """Wall time of earlier launches, in hours, each up to its last event."""
        seconds, begun, last = 0.0, None, 0.0
        for event in self.events:
            if event["event"] == "launch":
                seconds += last - begun if begun is not None else 0.0
                begun = event["time"]
            last = event["time"]
        return (seconds + (last - begun if begun is not None else 0.0)) / 3600

    def launch(self) -> None:
        """A driver begins, or goes on."""
        self._write("launch")

    def suggest(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial is to be run with these values."""
        self._write("trial", trial=number, values=dict(values))

    def report(
        self,
        number: int,
        report: Report,
        decision: str,
        values: Mapping[str, Any],
        run: str,
        origin: str | None,
    ) -> None:
        """A trial has reported, and the scheduler has decided; `values` and `run` are those it has now."""
        known = self._trials[number]
        changed: Event = {"values": dict(values)} if dict(values) != known.values else {}
        self._write(
            "report",
            trial=number,
            report=asdict(report),
            decision=decision,
            run=run,
            origin=origin,
            **changed,
        )

    def end(self, number: int, status: Status, reason: str | None) -> None:
        """A trial has ended."""
        self._write("end", trial=number, status=status, reason=reason)

    def again(self, number: int) -> None:
        """A trial that had been stopped goes on: what stopped it is no more."""
        self._write("again", trial=number)

    def decision(self, number: int, report: int, run: str) -> str | None:
        """What was decided at a report of a trial's run; None if it is new."""
        found: str | None = None
        for event in self.events:
            if event.get("trial") != number:
                continue
            if event["event"] == "report" and event["report"]["number"] == report and event["run"] == run:
                found = str(event["decision"])
            elif event["event"] == "again" and found == "STOP":
                found = None
        return found

    def _of(self, kind: str, number: int) -> Iterator[Event]:
        return (event for event in self.events if event["event"] == kind and event["trial"] == number)

    def _write(self, kind: str, **content: Any) -> None:
        # As it will be read again.
        event = json.loads(json.dumps(finite({"event": kind, "time": round(time.time(), 3), **content})))
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        self._content += line
        if storage.is_local(self._path):
            _append(Path(storage.absolute(self._path)), line)
        else:
            storage.write_bytes(self._path, self._content)
        self.events.append(event)
        self._apply(event)

    def _apply(self, event: Event) -> None:
        number = event.get("trial", 0)
        match event["event"]:
            case "trial":
                self._trials[number] = Trial(number, event["values"])
            case "report":
                known = self._trials[number]
                report = Report(**event["report"])
                # A trial that was begun anew from another one's checkpoint has its reports before that no more.
                before = tuple(r for r in known.reports if r.number < report.number)
                self._trials[number] = replace(
                    known,
                    values=event.get("values", known.values),
                    reports=(*before, report),
                    run=event["run"],
                    origin=event["origin"],
                )
            case "again":
                self._trials[number] = replace(self._trials[number], status="running", reason=None)
            case "end":
                known = self._trials[number]
                self._trials[number] = replace(known, status=event["status"], reason=event["reason"])


def _append(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
