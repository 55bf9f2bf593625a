"""The sweep section of the config tree: what `python -m raytune_ds.sweep` searches, how, and how far it goes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import isclose, isfinite
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from raytune_ds.section import Count, Section, Setting, about, as_mapping, as_settings, frozen

Metric = Literal["eval_loss", "loss", "trainable_parameters", "tokens", "seconds", "tokens_per_s"]
Mode = Literal["min", "max"]

NUMBERS_OF = {
    "choice": None,
    "uniform": 2,
    "loguniform": 2,
    "quniform": 3,
    "randint": 2,
    "lograndint": 2,
    "expr": None,
}
"""Verbs of the search space, as Ray Tune names them, and how many numbers each of them takes."""
POPULATION = ("pbt", "pb2")
PAUSING = (*POPULATION, "hyperband")


class Dimension(Section):
    """One searched setting.

    Attributes:
        key: dotted.
        verb: choice, uniform ...; expr: a formula of other keys.
        values: the choices, the bounds, or the formula alone.
    """

    key: str
    verb: str
    values: tuple[Any, ...]


class SearcherConfig(Section):
    """What suggests the settings of the next trial."""

    kind: Literal["auto", "random", "grid", "optuna", "bayesopt"] = Field(
        default="auto",
        description="optuna: TPE, which learns from the trials so far; bayesopt: a Gaussian process, for numbers only; "
        "random; grid: every combination of choices. auto: optuna, or random for pbt and pb2, whose population is "
        "drawn at once.",
    )
    startup_trials: Count = Field(
        default=5,
        description="Trials drawn at random before optuna or bayesopt trust what they have seen. 5: a sweep of a "
        "dozen trials still learns something.",
    )


class SchedulerConfig(Section):
    """What stops trials early, or changes their settings as they go. Times count reports, of which each trial makes
    sweep.reports.
    """

    kind: Literal["asha", "hyperband", "median", "pbt", "pb2", "none"] = Field(
        default="asha",
        description="asha: at each rung only the best 1/reduction_factor goes on, without waiting for others; "
        "hyperband: the same in rounds; median: stops what is worse than the median of the others; pbt, pb2: the worst "
        "go on from a copy of the best with changed learning rate, dropout or weight decay; none.",
    )
    grace_period: Count = Field(
        default=1,
        description="Reports that every trial may make before it can be stopped. 1: with nine reports that is a ninth "
        "of a run.",
    )
    reduction_factor: float = Field(
        default=3.0, gt=1, description="asha, hyperband: of so many trials at a rung one goes on."
    )
    perturbation_interval: Count = Field(
        default=1, description="pbt, pb2: reports between two changes of the population."
    )
    quantile_fraction: float = Field(
        default=0.25,
        gt=0,
        le=0.5,
        description="pbt, pb2: share of the population that copies, and is copied.",
    )


class BudgetConfig(Section):
    """What a sweep may cost at most; once one of these is reached, its trials are stopped at their next report."""

    tokens: Count | None = Field(
        default=None, description="Tokens trained on, over all trials. null: no limit."
    )
    hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Hours of wall time, over all launches of the sweep. null: no limit."
    )
    money: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="What the hours may cost, at sweep.budget.price_per_hour. null: no limit."
    )
    price_per_hour: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Price of the cluster per hour, in the unit of sweep.budget.money. `raytune-ds render` names it. "
        "null: not known.",
    )

    @model_validator(mode="after")
    def _money_has_a_price(self) -> Self:
        if self.money is not None and self.price_per_hour is None:
            raise about("money", "needs sweep.budget.price_per_hour, which `raytune-ds render` names")
        return self


class SweepConfig(Section):
    """What is searched, by `python -m raytune_ds.sweep`."""

    space: tuple[Dimension, ...] | None = Field(
        default=None,
        description="Searched keys: {adapter.r: {choice: [8, 64]}, train.learning_rate: {loguniform: [1e-5, 1e-3]}, "
        "adapter.alpha: {expr: 2 * adapter.r}}; also uniform, quniform, randint and lograndint, as in ray.tune. null: "
        "one for LoRA or for all parameters, as adapter.kind says.",
    )
    trial: tuple[Setting, ...] = Field(
        default=(),
        description="Settings of the trials alone, dotted key to value, such as {train.max_steps: 100}. The promoted "
        "run has those of the rest of the config: the full budget, all the data.",
    )
    metric: tuple[Metric, ...] = Field(
        default=("eval_loss",),
        description="What makes a trial better, as it is at its newest report; a list: several objectives, of which "
        "the first decides what is stopped and promoted.",
    )
    mode: tuple[Mode, ...] | Literal["auto"] = Field(
        default="auto",
        description="Whether less is better, one for each metric. auto: max for tokens_per_s, otherwise min.",
    )
    trials: Count | Literal["auto"] = Field(
        default="auto",
        description="Trials at most; raise it to go on with a sweep. auto: 16, or all combinations of a grid.",
    )
    reports: Count = Field(
        default=9,
        description="How often each trial's held-out loss is measured, evenly over its run, unless train.eval_steps is "
        "given. 9: rungs at a ninth, a third and the whole of a run.",
    )
    max_concurrent: Count | Literal["auto"] = Field(
        default="auto",
        description="Trials at once. auto: as many as the cluster has or will have room for, scaling.num_workers each.",
    )
    give_up_after: Count = Field(
        default=3, description="Failed trials after which a sweep ends that has none that succeeded."
    )
    searcher: SearcherConfig = Field(default=SearcherConfig(), description="What suggests settings.")
    scheduler: SchedulerConfig = Field(default=SchedulerConfig(), description="What stops trials.")
    budget: BudgetConfig = Field(default=BudgetConfig(), description="What it may cost.")

    @field_validator("space", mode="before")
    @classmethod
    def _read_space(cls, given: Any) -> Any:
        if given is None or _all_are(Dimension, given):
            return given
        if not isinstance(given, dict):
            raise ValueError("takes keys and what is searched of them: {adapter.r: {choice: [8, 64]}}")
        specs = list(_specs(given))
        problems = _named_twice(key for key, _ in specs)
        dimensions = [_dimension(key, spec, problems) for key, spec in specs]
        if problems:
            raise ValueError("; ".join(problems))
        if not dimensions:
            raise ValueError("searches nothing; name keys, or leave it out for the default space")
        return dimensions

    @field_serializer("space")
    def _write_space(self, space: tuple[Dimension, ...] | None) -> dict[str, Any] | None:
        if space is None:
            return None
        return {d.key: {d.verb: d.values[0] if d.verb == "expr" else d.values} for d in space}

    @field_validator("trial", mode="before")
    @classmethod
    def _read_trial(cls, given: Any) -> Any:
        return as_settings(given, example="{train.max_steps: 100}")

    @field_serializer("trial")
    def _write_trial(self, trial: tuple[Setting, ...]) -> dict[str, Any]:
        return as_mapping(trial)

    @field_validator("metric", "mode", mode="before")
    @classmethod
    def _one_without_a_list(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) and given != "auto" else given

    @field_validator("metric")
    @classmethod
    def _each_metric_once(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if not metrics or len(set(metrics)) < len(metrics):
            raise ValueError("names one metric, or several different ones")
        return metrics

    @field_validator("mode")
    @classmethod
    def _a_mode_for_each_metric(cls, mode: Any, info: ValidationInfo) -> Any:
        metrics = info.data.get("metric", ())
        if mode != "auto" and metrics and len(mode) != len(metrics):
            raise ValueError(f"there are {len(metrics)} metrics ({', '.join(metrics)}); name a mode for each")
        return mode

    @model_validator(mode="after")
    def _searcher_and_scheduler_fit(self) -> Self:
        kind = self.searcher.kind
        if self.scheduler.kind in POPULATION and kind not in ("auto", "random"):
            raise about(
                "searcher",
                f"scheduler {self.scheduler.kind} draws its population at once; set searcher.kind=random",
            )
        if len(self.metric) > 1 and kind == "bayesopt":
            raise about("metric", "bayesopt has one objective; name one metric, or take searcher.kind=optuna")
        return self

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Min or max for each metric."""
        if self.mode != "auto":
            return self.mode
        return tuple("max" if metric == "tokens_per_s" else "min" for metric in self.metric)


def _all_are(kind: type[Section], given: Any) -> bool:
    return isinstance(given, tuple) and all(isinstance(item, kind) for item in given)


def _named_twice(keys: Iterable[str]) -> list[str]:
    """A key can be written nested and dotted, so YAML does not see that it is there twice."""
    counts = Counter(keys)
    return [f"{key}: is named twice" for key, count in counts.items() if count > 1]


def _specs(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and what is said of it; `adapter: {r: {choice: ...}}` is read like `adapter.r: {choice: ...}`."""
    for name, value in given.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and _is_nested(key, value):
            yield from _specs(value, f"{key}.")
        else:
            yield key, value


def _is_nested(key: str, value: Mapping[str, Any]) -> bool:
    """Whether these are keys below a key, and not a verb: a misspelt one is at a dotted key, and has no mapping."""
    if NUMBERS_OF.keys() & value.keys():
        return False
    return bool(value) and ("." not in key or any(isinstance(inner, dict) for inner in value.values()))


def _dimension(key: str, spec: Any, problems: list[str]) -> dict[str, Any] | None:
    """A dimension; what is wrong with it is added to `problems`."""
    verbs = ", ".join(NUMBERS_OF)
    if isinstance(spec, dict) and len(spec) > 1:
        problems.append(f"{key}: has {' and '.join(map(str, spec))}; write one of {verbs}")
        return None
    if not isinstance(spec, dict) or not spec:
        problems.append(f"{key}: write one of {verbs}, such as {{choice: [8, 16]}}")
        return None
    verb, values = next(iter(spec.items()))
    if verb not in NUMBERS_OF:
        problems.append(f"{key}: {verb} is none of {verbs}")
    elif problem := _expr_problem(values) if verb == "expr" else _values_problem(verb, values):
        problems.append(f"{key}: {verb} {problem}")
    return {"key": key, "verb": verb, "values": frozen([values] if verb == "expr" else values)}


def _expr_problem(formula: Any) -> str | None:
    return None if isinstance(formula, str) and formula.strip() else "takes a formula, such as 2 * adapter.r"


def _values_problem(verb: str, values: Any) -> str | None:
    if verb == "choice":
        return None if isinstance(values, list) and values else "takes a list of values"
    count = NUMBERS_OF[verb]
    if not (isinstance(values, list) and len(values) == count and all(map(_is_number, values))):
        return "takes [low, high, step]" if count == 3 else "takes [low, high]"
    low, high = values[:2]
    if not low < high:
        return f"runs from {low} to {high}; write the lower bound first"
    if verb.startswith("log") and low <= 0:
        return f"begins at {low}; a logarithmic range begins above 0"
    if verb.endswith("randint") and not all(isinstance(bound, int) for bound in values):
        return "takes whole numbers"
    return _step_problem(*values) if count == 3 else None


def _step_problem(low: float, high: float, step: float) -> str | None:
    if step <= 0:
        return "takes a step above 0"
    # As Ray Tune wants it.
    if not all(isclose(bound / step, round(bound / step)) for bound in (low, high)):
        return f"runs from {low} to {high} in steps of {step}; both bounds have to be multiples of the step"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
