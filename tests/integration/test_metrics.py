"""A run's metrics where Prometheus would read them: on the port that Ray's agent on the node offers."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable

import pytest

from raytune_ds.metrics import GAUGES, PREFIX
from tests.helpers import Run

DEADLINE_S = 60


def scraped(run: str) -> dict[str, float]:
    """The run's metrics as the node offers them now."""
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^ray_{PREFIX}(\w+){{.*\brun="{run}".*}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def wait_for(condition: Callable[[dict[str, float]], bool], run: str) -> dict[str, float]:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if condition(values := scraped(run)):
            return values
        time.sleep(0.2)
    raise TimeoutError(f"of {run} there is {values}")


def test_a_run_is_exported_while_it_lasts(run: Run) -> None:
    """To the last step, and then no more. The GPU's part needs a GPU."""
    settings = ("train.max_steps=6", "train.global_batch=4", "data.seq_len=256", "scaling.num_workers=1")
    result = run("run.name=seen", *settings)
    # The last to come is the checkpoint of the last step.
    values = wait_for(lambda values: "checkpoint_bytes" in values, "seen")
    assert values.keys() == GAUGES.keys() - {"mfu_ratio"}
    assert values["step"] == values["total_steps"] == 6
    assert values["loss"] == pytest.approx(result.progress["last_loss"])
    assert values["eval_loss"] == pytest.approx(result.progress["last_eval_loss"])
    assert values["workers"] == result.num_workers
    assert values["restarts"] == values["skipped_steps"] == 0
    assert values["tokens_per_second"] > 0
    assert 0 < values["data_wait_ratio"] < 1
    assert wait_for(lambda values: not values, "seen") == {}
