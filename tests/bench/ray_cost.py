"""What Ray costs while a run trains: the same worker on the same store, with Ray Train around it and without.

The two alternate, each in a process of its own with one thread, and train the same steps of the same seed: the losses
are equal. Counted is the time from the end of the first step to the end of the last, as the run's TensorBoard file
has it; `between` is what of that is no step's time: metrics, logs, and whatever is asked of workers between steps.

    python -m tests.bench.ray_cost [ALTERNATIONS]
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from raytune_ds import allocator, early
from raytune_ds.console import say, table
from tests.bench import start

ALTERNATIONS = 5
STEPS = 24
SHAPE = {**start.SHAPE, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}


@dataclass(frozen=True)
class Pace:
    """Of the steps after the first: tokens a second, and shares of the time."""

    tokens_per_s: float
    data_wait: float
    between: float
    loss: float


def main(alternations: int = ALTERNATIONS) -> None:
    """Prints the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster ends with it
    # Ray gives a worker of one CPU one thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rds") as scratch:
        root = Path(scratch)
        with start.cluster(root) as address:
            start.inputs(root, SHAPE)
            _with_ray(root, address, "first")  # prepares the store
            paces: dict[str, list[Pace]] = {"without Ray": [], "on Ray, 1 worker": []}
            for turn in range(alternations):
                paces["without Ray"].append(_without_ray(root, f"alone{turn}"))
                paces["on Ray, 1 worker"].append(_with_ray(root, address, f"ray{turn}"))
                rate, on_ray = (of_side[-1].tokens_per_s for of_side in paces.values())
                say(f"pair {turn + 1}: {rate:,.0f} and {on_ray:,.0f} tokens/s, ratio {on_ray / rate:.3f}")
    rates = {side: [pace.tokens_per_s for pace in of_side] for side, of_side in paces.items()}
    slowest = statistics.median(rates["without Ray"])
    table(
        f"The same {STEPS} steps, {alternations} alternations",
        ["", "tokens/s", "ratio", "data wait", "between", "last loss"],
        [
            [
                side,
                f"{statistics.median(rates[side]):,.0f}",
                f"{statistics.median(rates[side]) / slowest:.3f}",
                f"{statistics.median(pace.data_wait for pace in of_side):.2%}",
                f"{statistics.median(pace.between for pace in of_side):.2%}",
                f"{of_side[0].loss:.6f}",
            ]
            for side, of_side in paces.items()
        ],
    )


def _settings(root: Path, name: str) -> list[str]:
    return [
        *start.settings(root, name, seq_len=1024),
        f"train.max_steps={STEPS}",
        "train.global_batch=1",
        "checkpoint.every_steps=1000",
    ]


def _with_ray(root: Path, address: str, name: str) -> Pace:
    command = [sys.executable, "-m", "raytune_ds.train", *_settings(root, name)]
    return _run(command, root, name, RAY_ADDRESS=address)


def _without_ray(root: Path, name: str) -> Pace:
    command = [sys.executable, "-m", __spec__.name, "alone", *_settings(root, name)]
    return _run(command, root, name, **allocator.jemalloc(early.JEMALLOC))  # as a worker begins


def _run(command: list[str], root: Path, name: str, **environment: str) -> Pace:
    told = {**os.environ, **start.ENVIRONMENT, **environment}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return _pace(root / "runs" / name)


def _pace(run: Path) -> Pace:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row][1:]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    ends = [event.wall_time for event in events.Scalars("loss")]
    seconds, in_steps = ends[-1] - ends[0], sum(row["step_time_s"] for row in rows)
    return Pace(
        tokens_per_s=sum(row["tokens"] for row in rows) / seconds,
        data_wait=sum(row["data_wait_s"] for row in rows) / seconds,
        between=1 - in_steps / seconds,
        loss=rows[-1]["loss"],
    )


def alone(overrides: list[str]) -> None:
    """A worker of the run with these settings, in this process."""
    from raytune_ds import storage
    from raytune_ds.check import check
    from raytune_ds.compose import compose
    from raytune_ds.launch import assign
    from tests.alone import work

    given = assign(check(compose([], overrides)))  # the store is there
    storage.make_dir(given.run.path)
    outcome = work(given, lambda kind, content: None)
    assert outcome.error is None, outcome.error


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:
        alone(sys.argv[2:])
    else:
        main(*map(int, sys.argv[1:]))
