"""What the events of a run make of its metrics, and that the dashboard asks for metrics that there are."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.display import RATE_STEPS, Display, shares_of_time
from raytune_ds.metrics import GAUGES, PREFIX, Meter
from tests.helpers import DASHBOARD, queries

START = {
    "step": 0,
    "total_steps": 40,
    "world_size": 2,
}
ROW = {
    "step": 1,
    "epoch": 0.1,
    "loss": 2.5,
    "weight": 50.0,
    "tokens": 100,
    "targets": 50,
    "pairs": 1000,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "skipped": False,
    "step_time_s": 2.0,
    "tokens_per_s": 50.0,
    "data_wait_s": 0.5,
    "model_tflops": 0.4,
    "mfu": 0.4,
    "world_size": 2,
}
CHECKPOINT = {"step": 1, "label": {}, "path": "", "size": 1000, "seconds": 1.5}
EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("start", START),
    ("step", ROW),
    ("eval", {"step": 1, "eval_loss": 2.25}),
    ("checkpoint_wait", {"step": 1, "checkpoint_wait_s": 0.5}),
    ("checkpoint", CHECKPOINT),
    ("restart", {"text": "worker 1 died", "rank": 1}),
]


def after(*events: tuple[str, dict[str, Any]]) -> dict[str, float]:
    """All values once these have happened after a start."""
    meter = Meter()
    values = meter.read("start", START)
    for kind, content in events:
        values |= meter.read(kind, content)
    return values


def test_each_gauge_has_its_value() -> None:
    values = after(*EVENTS[1:5])
    assert values.pop("last_step_timestamp_seconds") > 1.7e9
    assert values == pytest.approx(
        {
            "step": 1,
            "total_steps": 40,
            "workers": 2,
            "loss": 2.5,
            "eval_loss": 2.25,
            "learning_rate": 1e-4,
            "grad_norm": 0.5,
            "skipped_steps": 0,
            "tokens_per_second": 50,
            "step_seconds": 2.0,
            "data_wait_ratio": 0.25,
            "mfu_ratio": 0.4,
            "checkpoint_wait_seconds": 0.5,
            "checkpoint_wait_ratio": 0.5 / 2.5,
            "checkpoint_write_seconds": 1.5,
            "checkpoint_bytes": 1000,
        }
    )


def test_every_gauge_comes_from_some_event() -> None:
    assert after(*EVENTS).keys() == GAUGES.keys()


def test_rates_are_means_over_the_last_steps() -> None:
    """By time: a slow step counts for as long as it took, and is forgotten in the end."""
    slow = ROW | {"step_time_s": 6.0, "data_wait_s": 4.5, "mfu": 0.2}
    values = after(("step", slow), ("step", ROW))
    assert values["tokens_per_second"] == pytest.approx(200 / 8)
    assert values["step_seconds"] == pytest.approx(4.0)
    assert values["data_wait_ratio"] == pytest.approx(5.0 / 8)
    assert values["mfu_ratio"] == pytest.approx((6.0 * 0.2 + 2.0 * 0.4) / 8)
    values = after(("step", slow), *[("step", ROW)] * RATE_STEPS)
    assert values["tokens_per_second"] == pytest.approx(50)


def test_of_an_unknown_gpu_no_utilisation_is_claimed() -> None:
    row = {key: value for key, value in ROW.items() if key != "mfu"}
    assert "mfu_ratio" not in after(("step", row), *EVENTS[2:])


def test_nothing_is_trained_while_workers_restart() -> None:
    meter = Meter()
    for kind, content in EVENTS[:5]:
        meter.read(kind, content)
    assert meter.read(*EVENTS[5]) == {"restarts": 1, "tokens_per_second": 0, "mfu_ratio": 0}
    assert meter.read("start", START | {"step": 1, "world_size": 1})["workers"] == 1
    again = meter.read("step", ROW | {"step_time_s": 4.0})
    assert again["tokens_per_second"] == pytest.approx(25), (
        "the rate of the former workers counts for nothing"
    )
    assert meter.read(*EVENTS[5])["restarts"] == 2


def test_a_step_that_is_not_finite() -> None:
    values = after(("step", ROW), ("step", ROW | {"skipped": True, "grad_norm": math.nan}))
    assert values["skipped_steps"] == 1
    assert math.isnan(values["grad_norm"])


def test_what_is_no_measurement_changes_nothing() -> None:
    assert Meter().read("note", {"text": "engine: ddp"}) == {}


def test_the_display_knows_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """The same events go to both."""
    with Display() as display:
        for kind, content in EVENTS:
            display.show(kind, content)
    assert "held-out loss 2.25" in capsys.readouterr().out


def test_the_end_says_what_the_time_went_into() -> None:
    """Waiting for data is a part of a step; the others come on top of the steps."""
    progress = {"seconds": 70.0, "data_wait_s": 0.5, "checkpoint_wait_s": 10.0, "eval_s": 19.5, "log_s": 0.5}
    assert (
        shares_of_time(progress)
        == "waiting for data 0.5 %, evaluations 19.5 %, checkpoints 10.0 %, metrics 0.5 %"
    )
    before_these_were_counted = {"seconds": 30.0, "checkpoint_wait_s": 10.0}
    assert "data 0.0 %, evaluations 0.0 %, checkpoints 25.0 %" in shares_of_time(before_these_were_counted)


# ---- the dashboard --------------------------------------------------------------------------------


def metrics_of_ray() -> str:
    """The source in which Ray names its metrics: those of nodes, and those of its own dashboards."""
    spec = importlib.util.find_spec("ray.dashboard")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    modules = Path(spec.submodule_search_locations[0]) / "modules"
    files = ("reporter/reporter_agent.py", "metrics/dashboards/default_dashboard_panels.py")
    return "\n".join((modules / name).read_text(encoding="utf-8") for name in files)


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    source = metrics_of_ray()
    asked = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    ours = {name.removeprefix(f"ray_{PREFIX}") for name in asked if name.startswith(f"ray_{PREFIX}")}
    theirs = {name for name in asked if not name.startswith(f"ray_{PREFIX}")}
    assert ours == GAUGES.keys(), "each of ours is shown, and none that is not there"
    bare = {name.removeprefix("ray_") for name in theirs}
    assert {name for name in bare if not re.search(rf"\b(ray_)?{name}\b", source)} == set()
    assert len(theirs) > 8


def test_the_dashboard_is_sound() -> None:
    """Panels that do not overlap, all from the data source that is provisioned, chosen by run."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
            assert panel["description"].endswith(".")
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    choices, *_ = dashboard["templating"]["list"]
    assert choices["name"] == "run"
    filters = [query for query in queries() if PREFIX in query and query != f"ray_{PREFIX}step"]
    assert all('{run=~"$run"}' in query for query in filters)
