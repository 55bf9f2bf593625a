"""Plays a scenario from its start to the comparison of its end with that of a calm run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raytune_ds.rundir import parse_lines
from tests.faults.chaos.scenarios import ENGINES, SETTINGS, STEPS, Scenario
from tests.faults.chaos.strike import Missed, Struck, lines_of, strike, survey
from tests.faults.nodes import Nodes, nodes

ATTEMPTS = 3
"""Starts of the same command, should it end before the run does."""
TRIES = 5
"""Of a scenario whose moment was too short to be caught."""
DEADLINE_S = 300.0
TIMES = ("step_time_s", "tokens_per_s", "model_tflops", "mfu", "data_wait_s", "checkpoint_wait_s")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ending:
    """How a scenario ended.

    Attributes:
        problem: in what the run differs from a calm one; empty if in nothing.
        struck: what was killed, when.
        again: steps that were done again.
        back_s: from the deed to the end of the first step after it.
        parts: what those seconds consist of, as the run itself tells.
        starts: of the command.
    """

    problem: str
    struck: Struck | None = None
    again: int | None = None
    back_s: float | None = None
    parts: str = ""
    starts: int = 1


def calm(engine: str, rows: Path, storage: Path) -> Path:
    """The run directory of a run of an engine that nothing befalls."""
    run = storage / f"calm-{engine.replace(' ', '-')}"
    with nodes(2) as cluster:
        driver = _start(cluster, run, rows, ENGINES[engine], "scaling.num_workers=2")
        code = driver.wait(DEADLINE_S)
    assert code == 0, f"{run}.log"
    return run


def play(scenario: Scenario, rows: Path, storage: Path, undisturbed: Path) -> Ending:
    """Runs it; anew where its moment did not come."""
    for number in range(TRIES):
        try:
            return _play(scenario, rows, storage / f"run-{scenario.seed}-{number}", undisturbed)
        except Missed as missed:
            why = str(missed)
    return Ending(f"nothing was killed: {why}")


def _play(scenario: Scenario, rows: Path, run: Path, undisturbed: Path) -> Ending:
    struck = None
    back = _Back(run / "metrics.jsonl")
    with ExitStack() as stack:
        cluster = stack.enter_context(nodes(2 if scenario.elastic else 3))
        for start in range(1, ATTEMPTS + 1):
            driver = _start(cluster, run, rows, ENGINES[scenario.engine], scenario.num_workers)
            try:
                if struck is None:
                    struck = strike(scenario, cluster, driver, run)
                    back.begin(struck)
                code = driver.wait(DEADLINE_S)
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                return Ending(f"not ended after {DEADLINE_S:.0f}s", struck, starts=start)
            finally:
                if driver.poll() is None:
                    driver.kill()
            if code == 0:
                break
            if struck.what not in ("driver", "head"):
                return Ending(f"exit code {code}, see {run}.log", struck, starts=start)
            back.end()
            # Workers go on for a while without driver or head.
            back.begin(survey(run, struck.what, struck.at))
            if struck.what == "head":
                cluster = stack.enter_context(nodes(3))
        else:
            return Ending(f"exit code {code}, see {run}.log", struck, starts=start)
    back_s = back.end()
    restarts = json.loads((run / "result.json").read_text())["restarts"]
    problem = (
        _untouched(scenario, run, restarts, start)
        or difference(run, undisturbed, bitwise=not scenario.elastic)
        or _unproven(run)
    )
    return Ending(problem, struck, back.again, back_s, ", ".join(map(_parts, restarts)), start)


def _untouched(scenario: Scenario, run: Path, restarts: list[Any], starts: int) -> str:
    """Why nothing can be told from a run: what was killed made no difference to it."""
    if scenario.victim != "fetch" and not restarts and starts == 1:
        return "the run did not notice"
    if scenario.elastic and all(row["world_size"] == 2 for row in _steps(run)):
        return "it never went on with one worker"
    return ""


def _parts(restart: dict[str, Any]) -> str:
    keys = ("noticing_s", "starting_s", "loading_s", "first_step_s")
    return "+".join(f"{restart[key] or 0:.0f}" for key in keys)


class _Back:
    """Waits, beside the run, for the first step after the deed."""

    def __init__(self, metrics: Path) -> None:
        self.again: int | None = None
        self._metrics = metrics
        self._seconds: float | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()

    def begin(self, struck: Struck) -> None:
        self._end.clear()
        self._struck = struck
        self._seconds = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> float | None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        return self._seconds

    def _look(self) -> None:
        while not self._end.wait(0.05):
            new = [line for line in lines_of(self._metrics) if line not in self._struck.lines]
            if new:
                self._seconds = time.monotonic() - self._struck.at
                first = parse_lines(new[0] + b"\n")[0]["step"]
                self.again = max(0, self._struck.step - first + 1)
                return


def _start(cluster: Nodes, run: Path, rows: Path, engine: tuple[str, ...], num_workers: str) -> psutil.Popen:
    command = [sys.executable, "-m", "raytune_ds.train", f"data.sources={rows}", *SETTINGS, *engine]
    command += [num_workers, f"run.storage={run.parent}", f"run.name={run.name}"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "HF_HUB_OFFLINE": "1"}
    with Path(f"{run}.log").open("ab") as log:
        return psutil.Popen(command, env=environment, stdout=log, stderr=log)


def difference(run: Path, other: Path, bitwise: bool) -> str:
    """In what two finished runs differ: to the bit, or in losses by more than rounding; empty if in nothing."""
    ours, theirs = _rows(run), _rows(other)
    if [row["step"] for row in _steps(run)] != list(range(1, STEPS + 1)):
        return "metrics.jsonl has not each step once"
    if len(ours) != len(theirs):
        return f"metrics.jsonl has {len(ours)} lines, not {len(theirs)}"
    if not _weights(run) or _weights(run).keys() != _weights(other).keys():
        return f"final/ has other files: {sorted(_weights(run))}"
    if bitwise:
        if ours != theirs:
            first = next(row for row, there in zip(ours, theirs, strict=True) if row != there)
            return f"metrics.jsonl differs from step {first['step']} on"
        return "" if _weights(run) == _weights(other) else "the weights differ"
    for row, there in zip(ours, theirs, strict=True):
        if row.get("batch") != there.get("batch"):
            return f"step {row['step']}: another batch"
        for key in {"loss", "eval_loss"} & row.keys():
            if abs(row[key] - there[key]) > TOLERANCE * abs(there[key]):
                return f"step {row['step']}: {key} {row[key]}, not {there[key]}"
    return ""


def _steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in parse_lines((run / "metrics.jsonl").read_bytes()) if "loss" in row]


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = parse_lines((run / "metrics.jsonl").read_bytes())
    kept = [{k: v for k, v in row.items() if k not in (*TIMES, "world_size")} for row in rows]
    return [row for row in kept if row.keys() - {"step"}]


def _weights(run: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (run / "final").glob("*.safetensors")
    }


def _unproven(run: Path) -> str:
    command = [sys.executable, "-m", "raytune_ds", "verify", "--run", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"verify: {done.stdout}{done.stderr}".strip()
