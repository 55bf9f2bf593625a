"""The journal of a sweep: what was decided, and what is known of the trials after a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.sweep import journal as module
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.records import Report, Trial
from tests.helpers import write_jsonl


def made_report(number: int, loss: float | None = 2.0, total: int = 9, **metrics: float | None) -> Report:
    """A hundred tokens and half a second for each report before it."""
    known = {"eval_loss": loss, "loss": loss, "tokens": 100 * number, **metrics}
    return Report(number, 2 * number, 2 * total, 100 * number, 0.5 * number, known)


@pytest.fixture(params=["local", "object store"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """On a file tree, and where nothing can be appended to."""
    if request.param == "local":
        return f"{tmp_path}/sweep/journal.jsonl"
    return f"{request.getfixturevalue('bucket')}/sweep/journal.jsonl"


def filled(path: str) -> Journal:
    """Two trials that have ended, and one that goes on."""
    journal = Journal(path)
    journal.launch()
    for number, r in ((1, 4), (2, 8), (3, 16)):
        journal.suggest(number, {"adapter.r": r, "adapter.targets": ("a", "b")})
    for number, loss in ((1, 3.0), (2, 4.0), (1, 2.0)):
        report = made_report(1 if loss > 2 else 2, loss)
        values = journal.trial(number).values
        journal.report(number, report, "CONTINUE" if number == 1 else "STOP", values, f"/t/{number}", None)
    journal.end(2, "stopped", "by asha at report 1")
    journal.end(1, "finished", None)
    return journal


TRIALS = [
    Trial(
        1,
        {"adapter.r": 4, "adapter.targets": ["a", "b"]},
        "finished",
        (made_report(1, 3.0), made_report(2, 2.0)),
        "/t/1",
    ),
    Trial(
        2,
        {"adapter.r": 8, "adapter.targets": ["a", "b"]},
        "stopped",
        (made_report(1, 4.0),),
        "/t/2",
        "by asha at report 1",
    ),
    Trial(3, {"adapter.r": 16, "adapter.targets": ["a", "b"]}),
]


def test_what_is_written_is_known_at_once_and_read_again(path: str) -> None:
    """Just the same: searchers and schedulers must not see a difference."""
    journal = filled(path)
    assert journal.trials == TRIALS
    again = Journal(path)
    assert (again.trials, again.events) == (TRIALS, journal.events)
    assert again.trial(2) == again.find(2) == TRIALS[1]
    assert again.find(4) is None


def test_a_new_journal_is_empty(path: str) -> None:
    """And makes no file."""
    journal = Journal(path)
    assert (journal.trials, journal.events, journal.hours_before) == ([], [], 0)
    assert not module.storage.exists(path)


def test_it_goes_on_after_any_byte(path: str) -> None:
    """A line that a dying process left half written was never acted upon, and the next one is whole."""
    filled(path)
    content = module.storage.read_bytes(path)
    first = content.index(b"\n") + 1
    for cut in (0, 1, first - 1, first, first + 1, len(content) - 1, len(content)):
        module.storage.write_bytes(path, content[:cut])
        whole = content[:cut].count(b"\n")
        journal = Journal(path)
        assert len(journal.events) == whole
        journal.launch()
        lines = module.storage.read_bytes(path).splitlines()
        assert [json.loads(line) for line in lines] == journal.events
        assert len(lines) == whole + 1


def test_a_loss_that_is_no_number_is_the_same_before_and_after_a_crash(path: str) -> None:
    """JSON has no NaN."""
    journal = Journal(path)
    journal.suggest(1, {})
    journal.report(1, made_report(1, math.nan, tokens_per_s=math.inf), "STOP", {}, "/t/1", None)
    (trial,) = journal.trials
    assert trial == Journal(path).trial(1)
    assert trial.last is not None
    assert trial.last.metrics == {"eval_loss": None, "loss": None, "tokens": 100, "tokens_per_s": None}


def test_decisions_are_those_of_a_run(path: str) -> None:
    """A trial that was begun anew from another one's checkpoint has another run."""
    journal = filled(path)
    journal.report(3, made_report(1), "PAUSE", journal.trial(3).values, "/t/3", None)
    journal.report(3, made_report(1), "CONTINUE", journal.trial(3).values, "/t/3-from-1", "trial 1")
    assert journal.decision(1, 2, "/t/1") == "CONTINUE"
    assert journal.decision(2, 1, "/t/2") == "STOP"
    assert journal.decision(3, 1, "/t/3") == "PAUSE"
    assert journal.decision(3, 1, "/t/3-from-1") == "CONTINUE"
    assert [journal.decision(1, 3, "/t/1"), journal.decision(1, 2, "/t/2"), journal.decision(4, 1, "")] == [
        None
    ] * 3


def test_a_fork_cuts_the_reports_it_does_not_share(path: str) -> None:
    """And has other values from then on; those that it was begun with are known, too."""
    journal = Journal(path)
    journal.suggest(1, {"train.learning_rate": 1e-3})
    for number in (1, 2, 3):
        journal.report(1, made_report(number, 5.0), "PAUSE", {"train.learning_rate": 1e-3}, "/t/1", None)
    journal.report(
        1, made_report(2, 4.0), "PAUSE", {"train.learning_rate": 2e-3}, "/t/1-from-2", "trial 2, step 2"
    )
    trial = Journal(path).trial(1)
    assert trial.reports == (made_report(1, 5.0), made_report(2, 4.0))
    assert (trial.run, trial.origin) == ("/t/1-from-2", "trial 2, step 2")
    assert trial.values == {"train.learning_rate": 2e-3}
    assert journal.first_values(1) == {"train.learning_rate": 1e-3}


def test_values_are_written_when_they_change_only(path: str) -> None:
    """Most never do."""
    events = filled(path).events
    assert [sorted(event) for event in events if event["event"] == "report"] == [
        ["decision", "event", "origin", "report", "run", "time", "trial"]
    ] * 3


def event(kind: str, time: float) -> dict[str, Any]:
    return {"event": kind, "time": time, "trial": 1, "values": {}, "status": "failed", "reason": None}


@pytest.mark.parametrize(
    ("times", "hours"),
    [
        ([("launch", 0)], 0),
        ([("launch", 0), ("trial", 3600)], 1),
        ([("launch", 0), ("trial", 3600), ("launch", 36000)], 1),
        ([("launch", 0), ("trial", 3600), ("launch", 36000), ("end", 37800)], 1.5),
        ([("launch", 0), ("launch", 36000), ("trial", 37800), ("launch", 72000), ("end", 75600)], 1.5),
    ],
)
def test_hours_are_those_of_the_launches_not_of_the_pauses_between(
    tmp_path: Path, times: list[tuple[str, float]], hours: float
) -> None:
    """Each up to the last that is known of it."""
    file = write_jsonl(tmp_path / "journal.jsonl", [event(kind, at) for kind, at in times])
    assert Journal(str(file)).hours_before == hours
