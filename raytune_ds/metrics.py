"""The progress of a run as Ray metrics, which every node of a cluster offers to Prometheus.

They are gauges, also what only grows: Ray's agent forgets a gauge 20 seconds after it was last set, but a counter only
when the node goes. So a run that is over is gone, and does not stand at its last value.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from ray.util.metrics import Gauge

from raytune_ds.display import RATE_STEPS

# Ray puts ray_ in front. Means are over the last steps (RATE_STEPS).
GAUGES = {
    "step": "Optimizer steps that are done.",
    "total_steps": "Optimizer steps of the whole run.",
    "last_step_timestamp_seconds": "When the last step ended, in Unix time. It grows old where a run hangs.",
    "workers": "Workers that train.",
    "loss": "Training loss of the last step, in nats per supervised token.",
    "eval_loss": "Held-out loss, in nats per supervised token.",
    "learning_rate": "Learning rate of the last step.",
    "grad_norm": "Norm of the last gradient, before clipping.",
    "skipped_steps": "Steps whose gradient was not finite and not applied, since the run was last started.",
    "tokens_per_second": "Tokens that all workers train on in a second, a mean. 0 while workers restart.",
    "mfu_ratio": "Operations that the model needs over those that the GPUs could do, a mean. Known GPUs only.",
    "step_seconds": "Time of a step, a mean.",
    "data_wait_ratio": "Share of a step's time in which worker 0 waits for data, a mean.",
    "checkpoint_wait_ratio": "Share of the time since the workers started in which training stood still for one.",
    "checkpoint_wait_seconds": "Time that training stood still for the last checkpoint.",
    "checkpoint_write_seconds": "Time that the last checkpoint took to be written, mostly in the background.",
    "checkpoint_bytes": "Size of the last checkpoint.",
    "restarts": "Restarts of the workers since the run was last started.",
}
PREFIX = "raytune_ds_"


class RunMetrics:
    """The gauges of one run; they end with the process that holds them."""

    def __init__(self, run: str) -> None:
        """`run` is the run's name, the tag of all of them."""
        self._meter = Meter()
        self._values: dict[str, float] = {"restarts": 0, "skipped_steps": 0}
        self._gauges = {
            name: Gauge(PREFIX + name, text, tag_keys=("run",)).set_default_tags({"run": run})
            for name, text in GAUGES.items()
        }

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """One event of the run, as the workers report it."""
        self._values |= self._meter.read(kind, content)

    def publish(self) -> None:
        """Sets the gauges. To be called every few seconds: Ray exports a value once for each time that it is set."""
        for name, value in self._values.items():
            self._gauges[name].set(value)


class Meter:
    """What an event of a run changes in its gauges."""

    def __init__(self) -> None:
        """Before the first event."""
        self._rows: deque[dict[str, Any]] = deque(maxlen=RATE_STEPS)
        self._restarts = self._skipped_steps = 0
        self._step_s = self._checkpoint_s = 0.0

    def read(self, kind: str, content: dict[str, Any]) -> dict[str, float]:
        """New values by the names in GAUGES; none where the kind says nothing about them."""
        read = getattr(self, f"_read_{kind}", None)
        return read(content) if read else {}

    def _read_start(self, content: dict[str, Any]) -> dict[str, float]:
        self._rows.clear()
        self._step_s = self._checkpoint_s = 0.0
        return {
            "step": content["step"],
            "total_steps": content["total_steps"],
            "workers": content["world_size"],
        }

    def _read_step(self, row: dict[str, Any]) -> dict[str, float]:
        self._rows.append(row)
        self._skipped_steps += row["skipped"]
        self._step_s += row["step_time_s"]
        seconds = self._sum("step_time_s")
        return {
            "step": row["step"],
            "last_step_timestamp_seconds": time.time(),
            "loss": row["loss"],
            "learning_rate": row["lr"],
            "grad_norm": row["grad_norm"],
            "skipped_steps": self._skipped_steps,
            "tokens_per_second": self._sum("tokens") / seconds,
            "step_seconds": seconds / len(self._rows),
            "data_wait_ratio": self._sum("data_wait_s") / seconds,
            **({"mfu_ratio": self._mean("mfu", seconds)} if "mfu" in row else {}),
        }

    def _read_eval(self, row: dict[str, Any]) -> dict[str, float]:
        return {"eval_loss": row["eval_loss"]}

    def _read_checkpoint_wait(self, row: dict[str, Any]) -> dict[str, float]:
        waited = row["checkpoint_wait_s"]
        self._checkpoint_s += waited
        share = self._checkpoint_s / (self._step_s + self._checkpoint_s)
        return {"checkpoint_wait_seconds": waited, "checkpoint_wait_ratio": share}

    def _read_checkpoint(self, content: dict[str, Any]) -> dict[str, float]:
        return {"checkpoint_write_seconds": content["seconds"], "checkpoint_bytes": content["size"]}

    def _read_restart(self, _: dict[str, Any]) -> dict[str, float]:
        self._restarts += 1
        knows_mfu = bool(self._rows) and "mfu" in self._rows[-1]
        idle = {"tokens_per_second": 0.0} | ({"mfu_ratio": 0.0} if knows_mfu else {})
        return {"restarts": self._restarts, **idle}

    def _mean(self, rate: str, seconds: float) -> float:
        """Of a rate, over the time of these steps."""
        return sum(row[rate] * row["step_time_s"] for row in self._rows) / seconds

    def _sum(self, key: str) -> float:
        return sum(row[key] for row in self._rows)
