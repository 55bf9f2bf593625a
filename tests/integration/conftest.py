"""What tests of a finished run share: one that was really trained."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from raytune_ds.metrics import PREFIX
from tests.helpers import write_jsonl

FACTS = [
    {"instruction": f"Name colour {n}", "input": "", "output": colour}
    for n, colour in enumerate(["red", "green", "blue", "grey"] * 8)
]
NAME = "colours"
DEADLINE_S = 60


@dataclass(frozen=True)
class Colours:
    """An adapter run on FACTS, a quarter of which is held out; read by several tests.

    Attributes:
        result: of the run.
        exported: its metrics as the node offered them at its end.
    """

    result: Any
    exported: dict[str, float]


@pytest.fixture(scope="session")
def colours(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Colours:
    """Made once; whoever changes something of it puts it back."""
    from raytune_ds.compose import compose
    from raytune_ds.launch import launch

    root = tmp_path_factory.mktemp(NAME)
    data = write_jsonl(root / "colours.jsonl", FACTS)
    settings = (
        f"run.storage={root}",
        f"run.name={NAME}",
        f"data.sources={data}",
        "data.seq_len=128",
        "data.eval.fraction=0.25",
        "scaling.num_workers=1",
        "adapter.use_rslora=true",
        "train.global_batch=2",
        "train.learning_rate=5e-3",
        "train.max_steps=12",
        "tracking.to=[]",
    )
    result = launch(compose([], settings))
    # The last to come is the checkpoint of the last step; there may have been one before.
    return Colours(
        result,
        wait_for_metrics(lambda values: values.get("step") == 12 and "checkpoint_bytes" in values),
    )


def wait_for_metrics(condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The run's metrics, on the port that Ray's agent on the node offers, once they are so."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if condition(values := _scraped()):
            return values
        time.sleep(0.2)
    raise TimeoutError(f"of {NAME} there is {values}")


def _scraped() -> dict[str, float]:
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^ray_{PREFIX}(\w+){{.*\brun="{NAME}".*}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}
