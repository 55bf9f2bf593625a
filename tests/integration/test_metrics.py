"""A run's metrics where Prometheus would read them: on the port that Ray's agent on the node offers."""

from __future__ import annotations

import pytest

from raytune_ds.metrics import GAUGES
from tests.integration.conftest import Colours, wait_for_metrics


def test_a_run_is_exported_while_it_lasts(colours: Colours) -> None:
    """To the last step, and then no more. The GPU's part needs a GPU."""
    values, result = colours.exported, colours.result
    assert values.keys() == GAUGES.keys() - {"mfu_ratio"}
    assert values["step"] == values["total_steps"] == 12
    assert values["loss"] == pytest.approx(result.progress["last_loss"])
    assert values["eval_loss"] == pytest.approx(result.progress["last_eval_loss"])
    assert values["workers"] == result.num_workers
    assert values["restarts"] == values["skipped_steps"] == 0
    assert values["tokens_per_second"] > 0
    assert 0 < values["data_wait_ratio"] < 1
    assert wait_for_metrics(lambda values: not values) == {}
