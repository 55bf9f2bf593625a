"""How good a finished run is, beside the model it began with: losses, answers, tasks, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from raytune_ds import cluster, storage
from raytune_ds.config import Config
from raytune_ds.console import say, warn
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.evaluation import card, harness, results
from raytune_ds.evaluation.comparison import compared, verdict
from raytune_ds.evaluation.datasets import DataSet, Role, from_file, held_out
from raytune_ds.evaluation.harness import Task, Tasks
from raytune_ds.evaluation.items import Outcome
from raytune_ds.evaluation.report import show
from raytune_ds.evaluation.results import Measured
from raytune_ds.evaluation.run import outcomes
from raytune_ds.evaluation.scoring import fitting_workers
from raytune_ds.evaluation.subject import Subject, finished, subjects
from raytune_ds.rundir import RunDir
from raytune_ds.trained import Trained

BATCH_SIZE = 16
_VERSIONS = ("raytune_ds", "torch", "transformers", "peft", "scipy", "rouge_score", "lm_eval")


@dataclass(frozen=True)
class Wish:
    """What is to be evaluated.

    Attributes:
        data: files to measure losses on, and answers where they have some.
        general: the same of what should not have been forgotten.
        tasks: of lm-eval, found in `include_path` too.
        limit: take this many rows of each.
        batch_size: rows at a time.
        with_base: measure the base model too.
        num_workers: of Ray Data, each with a model of its own; 0: this process; None: one a GPU.
        max_new_tokens: the longest answer; None: somewhat more than the longest expected one.
        seed: of the bootstrap.
    """

    data: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = BATCH_SIZE
    with_base: bool = True
    num_workers: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What was measured this time; evaluation.json has what was measured before, too.

    Attributes:
        run: the run directory.
        measured: each data set.
        unfit: rows that could not be rendered, and why.
    """

    run: RunDir
    measured: tuple[Measured, ...]
    unfit: tuple[str, ...]

    def of(self, name: str) -> Measured:
        """A data set by its name."""
        return next(one for one in self.measured if one.name == name)


def evaluate(path: str, wish: Wish, debug: bool = False) -> None:
    """Measures a finished run as `measure` does, and prints a table.

    Raises:
        UserError: see measure.
    """
    report = measure(path, wish, debug)
    show(report.measured, report.unfit)
    run = report.run
    say(f"written: {results.path_of(run)}, {results.answers_of(run)} and {run.final}/README.md")


def measure(path: str, wish: Wish, debug: bool = False) -> Report:
    """Measures a finished run, and writes it to the run directory and to the model card.

    Args:
        path: the run directory.
        wish: what is to be evaluated.
        debug: show what Ray says, too.

    Raises:
        UserError: it is no finished run, a file can't be used, or there is nothing to measure it on.
    """
    run, config = RunDir(storage.absolute(path)), finished(path)
    results.read(run)  # a damaged file is told of before the work
    tasks = Tasks.find(wish.tasks, wish.include_path) if wish.tasks else None
    spec = TokenizerSpec(run.final, None, config.model.trust_remote_code)
    sets = _data_sets(path, config, load_tokenizer(spec), wish)
    models = subjects(run.path, config, wish.with_base)
    found = _outcomes(models, spec, sets, wish, debug)
    settings = _settings(run, wish)
    measured = [_measured(one, rows, settings) for one, rows in zip(sets, found, strict=True)]
    if tasks is not None:
        figures = harness.run(models, spec, tasks, wish.limit, wish.batch_size, wish.seed)
        measured += [_of_task(task, settings) for task in figures]
    results.write_answers(run, list(zip(sets, found, strict=True)))
    together = results.write(run, config.model.name, measured, _versions())
    card.update(f"{run.final}/README.md", run.name, together)
    return Report(run, tuple(measured), tuple(reason for one in sets for reason in one.unfit))


def _data_sets(path: str, config: Config, tokenizer: Any, wish: Wish) -> list[DataSet]:
    files: list[tuple[str, Role]] = [(file, "data") for file in wish.data]
    files += [(file, "general") for file in wish.general]
    given = [file for file, _ in files]
    if twice := [file for file in given if given.count(file) > 1]:
        raise UserError(f"{twice[0]}: is named twice; a set is either --data or --general.")
    sets = [from_file(file, role, config, tokenizer, wish.limit, wish.max_new_tokens) for file, role in files]
    own = _own_split(path, wish, is_needed=not (sets or wish.tasks))
    return _named(([own] if own is not None else []) + sets)


def _own_split(path: str, wish: Wish, is_needed: bool) -> DataSet | None:
    """The run's own held-out rows; None where there are none, or they are gone."""
    try:
        found = held_out(Trained.read(path).store, wish.limit)
    except UserError as error:
        if is_needed:
            raise UserError(f"{error}\nOr name files to measure on: --data FILE") from error
        warn(f"the run's own held-out rows are not measured: {error}")
        return None
    if found.items:
        return found
    if is_needed:
        raise UserError(
            f"{path}: the run has no held-out rows (data.eval.fraction = 0); name files to measure on: --data FILE"
        )
    return None


def _named(sets: Sequence[DataSet]) -> list[DataSet]:
    """Each by a name of its own: the file's, or its whole path where two have the same."""
    names = [one.name for one in sets]
    return [one if names.count(one.name) == 1 else replace(one, name=one.path) for one in sets]


def _outcomes(
    models: Sequence[Subject], tokenizer: TokenizerSpec, sets: Sequence[DataSet], wish: Wish, debug: bool
) -> list[list[dict[str, Outcome]]]:
    """For each row of each data set what each side made of it. All rows go through each model in one go."""
    items = [item for one in sets for item in one.items]
    found: list[dict[str, Outcome]] = [{} for _ in items]
    if items:
        num_workers = wish.num_workers
        if num_workers != 0:
            cluster.connect(debug)
            num_workers = num_workers or fitting_workers()
        ends = sorted({end for one in sets for end in one.ends})
        for subject in models:
            done = outcomes(subject, tokenizer, ends, items, num_workers, wish.batch_size)
            found = [before | now for before, now in zip(found, done, strict=True)]
    rows = iter(found)
    return [[next(rows) for _ in one.items] for one in sets]


def _measured(data: DataSet, rows: Sequence[dict[str, Outcome]], settings: dict[str, Any]) -> Measured:
    metrics = compared(rows, settings["seed"])
    longest = max((item.max_new_tokens for item in data.items), default=0)
    return Measured(
        data.name,
        data.role,
        data.path,
        data.fingerprint,
        metrics,
        settings | ({"max_new_tokens": longest, "decoding": "greedy"} if longest else {}),
        verdict(data.name, metrics) if data.role == "general" else None,
        num_unfit=len(data.unfit),
        num_cut_off={side: sum(row[side].is_cut_off for row in rows) for side in rows[0]} if longest else {},
    )


def _of_task(task: Task, settings: dict[str, Any]) -> Measured:
    return Measured(task.name, "task", "", task.version, harness.metrics(task), settings)


def _settings(run: RunDir, wish: Wish) -> dict[str, Any]:
    result = storage.read_json(run.result) or {}
    return {
        "step": (result.get("progress") or {}).get("step"),
        "limit": wish.limit,
        "batch_size": wish.batch_size,
        "seed": wish.seed,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    there = {}
    for name in _VERSIONS:
        try:
            there[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return there
