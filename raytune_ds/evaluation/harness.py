"""Tasks of EleutherAI's lm-eval, by its own library, on the model that is loaded anyway."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from raytune_ds.console import say
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.evaluation.comparison import Metric
from raytune_ds.evaluation.intervals import CONFIDENCE, Estimate, rate, risen
from raytune_ds.evaluation.items import BASE, TUNED
from raytune_ds.evaluation.subject import Subject, playing

_NO_STDERR = "N/A"
"""As lm-eval writes it."""


@dataclass(frozen=True)
class Figure:
    """What lm-eval found.

    Attributes:
        value: of the metric.
        stderr: its standard error; None if it has none.
        n: documents.
    """

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Task:
    """One task's figures by side and metric, and the version of the task."""

    name: str
    version: str
    figures: Mapping[str, Mapping[str, Figure]]
    higher_is_better: Mapping[str, bool]


@dataclass(frozen=True)
class Tasks:
    """Tasks that there are.

    Attributes:
        names: of them, and of groups of tasks.
        manager: lm-eval's own, which has read the files of all tasks and takes seconds for that.
    """

    names: tuple[str, ...]
    manager: Any

    @staticmethod
    def find(names: Sequence[str], include_path: str | None) -> Tasks:
        """Looks for them in what comes with lm-eval, and in a folder of one's own.

        Raises:
            UserError: lm-eval is not installed, or there are no such tasks.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("--tasks: lm-eval is not installed; pip install 'raytune_ds[lm-eval]'.")
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"--include-path {include_path}: there is no such folder.")
        from lm_eval.tasks import TaskManager

        with _quiet():
            manager = TaskManager(include_path=include_path)
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            hint = "" if include_path else " Tasks of your own are found with --include-path DIR."
            raise UserError(
                f"--tasks {','.join(unknown)}: lm-eval knows no such task; `lm-eval ls tasks` lists them.{hint}"
            )
        return Tasks(tuple(names), manager)


def run(
    subjects: Sequence[Subject],
    tokenizer: TokenizerSpec,
    tasks: Tasks,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> list[Task]:
    """Every task with every side, in this process.

    Args:
        subjects: the models.
        tokenizer: of the trained one.
        tasks: to run.
        limit: documents of each task.
        batch_size: documents at a time.
        seed: of the examples that are shown to the model, where a task has some.

    Raises:
        UserError: a task's data can't be had.
    """
    found: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        model = subject.load()
        for side in subject.sides:
            say(f"lm-eval: {', '.join(tasks.names)} with the {side} model ...")
            with playing(model, side), _quiet():
                found[side] = _evaluate(model, load_tokenizer(tokenizer), tasks, limit, batch_size, seed)
        del model
    return [_task(name, found) for name in found[TUNED]["results"]]


def _evaluate(
    model: Any, tokenizer: Any, tasks: Tasks, limit: int | None, batch_size: int, seed: int
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"--tasks {','.join(tasks.names)}: lm-eval: {what}") from error
    assert found is not None  # on the first rank, and there is no other
    return dict(found)


def _task(name: str, found: Mapping[str, dict[str, Any]]) -> Task:
    whole = found[TUNED]
    return Task(
        name,
        str(whole["versions"].get(name, "")),
        {
            side: dict(_figures(one["results"][name], one["n-samples"].get(name, {})))
            for side, one in found.items()
        },
        {key: value is not False for key, value in whole["higher_is_better"].get(name, {}).items()},
    )


def _figures(results: Mapping[str, Any], samples: Mapping[str, int]) -> Iterator[tuple[str, Figure]]:
    """lm-eval calls them `acc,none` and `acc_stderr,none`, behind the comma the filter of the answers."""
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        stderr = results.get(f"{metric}_stderr,{filtered}", _NO_STDERR)
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        n = int(results.get("sample_len") or samples.get("effective", 0))
        yield name, Figure(float(value), None if stderr == _NO_STDERR else float(stderr), n)


def metrics(task: Task) -> tuple[Metric, ...]:
    """With intervals from lm-eval's standard errors; those of differences take both sides for independent."""
    return tuple(_metric(task, name) for name in task.figures[TUNED])


def _metric(task: Task, name: str) -> Metric:
    less = not task.higher_is_better.get(name.partition(" ")[0], True)
    tuned = _estimate(task.figures[TUNED][name])
    if BASE not in task.figures:
        return Metric(name, tuned, less_is_better=less)
    base = _estimate(task.figures[BASE][name])
    return Metric(name, tuned, base, risen(base, tuned), less_is_better=less)


def _estimate(figure: Figure) -> Estimate:
    if (
        figure.stderr == 0 and figure.value in (0, 1) and figure.n
    ):  # not that nothing else could have come out
        return rate(round(figure.value * figure.n), figure.n)
    half = math.inf if figure.stderr is None else float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * figure.stderr
    return Estimate(figure.value, figure.value - half, figure.value + half, figure.n)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells a page."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
