"""The config of a trial's run."""

from __future__ import annotations

import pytest

from raytune_ds.config import Config
from raytune_ds.sweep.attempt import _with_reports


@pytest.mark.parametrize(("policy", "most"), [("stop", 91), ("rewind", 10)])
def test_a_trial_that_diverges_is_not_stopped_as_a_failure(policy: str, most: int) -> None:
    """It is judged by its losses; going back is another matter, and was asked for."""
    config = _with_reports(Config(train={"on_skipped_steps": policy}), total_steps=90)
    assert config.train.max_skipped_steps == most
