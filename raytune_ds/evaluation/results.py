"""What is left of evaluations in the run directory: evaluation.json, and each answer in evaluation/answers.jsonl.

Both hold every data set that the run was ever measured on; one that is measured again is replaced.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ds import storage
from raytune_ds.errors import UserError
from raytune_ds.evaluation.comparison import Metric
from raytune_ds.evaluation.datasets import DataSet
from raytune_ds.evaluation.intervals import CONFIDENCE, Estimate
from raytune_ds.evaluation.items import Outcome
from raytune_ds.rundir import RunDir, parse_lines

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures of one data set.

    Attributes:
        name: of the data set.
        role: held-out, data, general or task.
        path, fingerprint: of the data; the path of a task is empty, and its fingerprint its version.
        metrics: each figure.
        settings: that decided them.
        verdict: on what may have been forgotten; of a general set.
        num_unfit: rows that could not be rendered.
        num_cut_off: answers that were ended by their longest permitted length, by side.
    """

    name: str
    role: str
    path: str
    fingerprint: str
    metrics: tuple[Metric, ...]
    settings: Mapping[str, Any]
    verdict: str | None = None
    num_unfit: int = 0
    num_cut_off: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def metric(self, name: str) -> Metric:
        """A figure by its name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def to_json(self) -> dict[str, Any]:
        """As it stands in evaluation.json."""
        values = dataclasses.asdict(self) | {"metrics": {m.name: _sides(m) for m in self.metrics}}
        return {key: value for key, value in values.items() if key != "name"}

    @staticmethod
    def from_json(name: str, values: dict[str, Any]) -> Measured:
        """The way back from `to_json`."""
        metrics = tuple(
            Metric(metric, **{side: _value(value) for side, value in sides.items()})
            for metric, sides in values["metrics"].items()
        )
        return Measured(name, **{**values, "metrics": metrics})


def _sides(metric: Metric) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(metric).items() if key != "name"}


def _value(value: Any) -> Any:
    """An estimate, or what is none. JSON has no infinite numbers: an end that is missing is one."""
    if not isinstance(value, dict):
        return value
    ends: dict[str, Any] = {"low": -math.inf, "high": math.inf, "value": math.nan}
    return Estimate(**{key: ends[key] if number is None else number for key, number in value.items()})


def path_of(run: RunDir) -> str:
    """Of the figures."""
    return f"{run.path}/evaluation.json"


def answers_of(run: RunDir) -> str:
    """Of the answers, a JSON object a line."""
    return f"{run.path}/evaluation/answers.jsonl"


def read(run: RunDir) -> list[Measured]:
    """All data sets that the run was measured on; none if it never was.

    Raises:
        UserError: the file is damaged.
    """
    try:
        values = storage.read_json(path_of(run)) or {"version": VERSION, "data_sets": {}}
        if values["version"] != VERSION:
            raise ValueError(f"its version is {values['version']}, not {VERSION}")
        return [Measured.from_json(name, one) for name, one in values["data_sets"].items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path_of(run)}: is damaged, or of another version of raytune_ds ({error}); remove it to begin anew."
        ) from error


def write(
    run: RunDir, base: str, measured: Sequence[Measured], versions: Mapping[str, str]
) -> list[Measured]:
    """Adds data sets to evaluation.json, or replaces those of the same name; returns all that are in it now.

    Raises:
        UserError: what is there is damaged.
    """
    together = {one.name: one for one in [*read(run), *measured]}
    values = {
        "version": VERSION,
        "run": run.name,
        "base_model": base,
        "confidence": CONFIDENCE,
        "versions": dict(versions),
        "data_sets": {name: one.to_json() for name, one in together.items()},
    }
    storage.write_json(path_of(run), values)
    return list(together.values())


def write_answers(run: RunDir, data: Sequence[tuple[DataSet, Sequence[dict[str, Outcome]]]]) -> None:
    """Adds the answers to all prompts of some data sets, or replaces those of data sets of the same name."""
    path = answers_of(run)
    there = parse_lines(storage.read_bytes(path)) if storage.exists(path) else []
    anew = {one.name for one, _ in data}
    rows = [row for row in there if row.get("data_set") not in anew]
    rows += [row for one, outcomes in data for row in _answers(one, outcomes)]
    if rows or there:
        storage.write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _answers(data: DataSet, outcomes: Sequence[dict[str, Outcome]]) -> list[dict[str, Any]]:
    return [
        {"data_set": data.name, "row": place, "prompt": list(prompt), "expected": item.expected}
        | {side: outcome.answer for side, outcome in row.items()}
        | {"scores": {side: outcome.scores for side, outcome in row.items()}}
        for item, place, prompt, row in zip(data.items, data.places, data.prompts, outcomes, strict=True)
        if item.prompt
    ]
