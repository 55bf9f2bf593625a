"""A trial's run: its config, and how one that has ended is told again."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ds.config import Config
from raytune_ds.sweep.attempt import Attempt, Ended, Origin, _with_reports
from raytune_ds.sweep.records import Status, Trial
from raytune_ds.sweep.sweepdir import SweepDir
from tests.unit.test_sweep_journal import made_report


@pytest.mark.parametrize(("policy", "most"), [("stop", 91), ("rewind", 10)])
def test_a_trial_that_diverges_is_not_stopped_as_a_failure(policy: str, most: int) -> None:
    """It is judged by its losses; going back is another matter, and was asked for."""
    config = _with_reports(Config(train={"on_skipped_steps": policy}), total_steps=90)
    assert config.train.max_skipped_steps == most


@pytest.mark.parametrize(("status", "error"), [("finished", None), ("failed", "no data"), ("stopped", None)])
@pytest.mark.parametrize(("step", "numbers"), [(None, [1, 2]), (2, [2])])
def test_a_trial_that_has_ended_is_told_again_and_not_run(
    status: Status, error: str | None, step: int | None, numbers: list[int]
) -> None:
    """From the journal alone: its directory may be gone. After a pause only what came later."""
    reports = tuple(made_report(number, total=3) for number in (1, 2, 3))
    ended = Trial(7, {}, status, reports, "/s/trials/0007", error)
    origin = None if step is None else Origin(7, "/s/trials/0007", step)
    nothing: Any = None
    attempt = Attempt(nothing, nothing, SweepDir("/s"), 7, {}, origin, ended, {}, nothing)
    told = [attempt.next() for _ in numbers]
    assert told == [reports[number - 1] for number in numbers]
    assert attempt.next() == Ended(reports[-1], error)
