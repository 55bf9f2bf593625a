"""What suggests the values of the next trial: Ray Tune's searchers, and the journal before them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.search import Searcher

from raytune_ds.errors import UserError
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.records import Goal
from raytune_ds.sweep.space import Space, Values, label, unlabelled
from raytune_ds.sweepconfig import Dimension, SearcherConfig


class Suggester(Protocol):
    """The part of a Ray Tune searcher that is used; trials go by their number as text."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Values by dotted key, choices by their label."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """How a trial ended."""


def domain(dimension: Dimension) -> Any:
    """A searched key as Ray Tune writes it."""
    if dimension.verb == "choice":
        return tune.choice([label(value) for value in dimension.values])
    return getattr(tune, dimension.verb)(*dimension.values)


class Random:
    """Draws each trial's values from the seed and its number alone."""

    def __init__(self, space: Space, seed: int) -> None:
        """Of that space."""
        self._domains, self._seed = {d.key: domain(d) for d in space.searched}, seed

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """See Suggester."""
        dice = np.random.default_rng((self._seed, int(trial_id)))
        return {key: _plain(domain.sample(random_state=dice)) for key, domain in self._domains.items()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See Suggester."""


class Grid(Random):
    """Every combination, in order."""

    def __init__(self, space: Space, seed: int) -> None:
        """Of that space, which has choices only."""
        super().__init__(space, seed)
        self._space = space

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """See Suggester."""
        point = self._space.grid_point((int(trial_id) - 1) % self._space.grid_size)
        return {key: label(value) for key, value in point.items()}


class Scaled:
    """Ray Tune's BayesOpt over ranges as it can take them: logarithms of logarithmic ones, whole numbers rounded.

    It is asked once for each trial, and told of each trial at once: what it suggests follows from the journal alone.
    """

    def __init__(self, space: Space, goal: Goal, config: SearcherConfig, seed: int) -> None:
        """Of that space, which has ranges only.

        Raises:
            UserError: its library is missing.
        """
        from ray.tune.search.bayesopt import BayesOptSearch

        self._dimensions = {d.key: d for d in space.searched}
        scales = {d.key: self._scale(d) for d in space.searched}
        self._bounds = {d.key: tuple(scales[d.key](bound) for bound in d.values[:2]) for d in space.searched}
        self._goal, self._seed = goal, seed
        self._points: dict[str, dict[str, float]] = {}
        try:
            self._search = BayesOptSearch(
                self._bounds,
                metric=goal.metrics[0],
                mode=goal.modes[0],
                points_to_evaluate=[self._random_point(n + 1) for n in range(config.startup_trials)],
                # Left to itself it has nothing to suggest while it waits, or when it suggests the same again.
                random_search_steps=0,
                skip_duplicate=False,
                patience=sys.maxsize,
                random_state=seed,
            )
        except AssertionError as error:
            raise UserError(
                f"sweep.searcher.kind = bayesopt: {_MISSING.format('bayesian-optimization')}"
            ) from error

    @staticmethod
    def _scale(dimension: Dimension) -> Callable[[float], float]:
        return math.log if dimension.verb.startswith("log") else float

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """See Suggester."""
        point = self._search.suggest(trial_id)
        if not isinstance(point, dict):
            return point
        known = [self._values(other) for other in self._points.values()]
        if self._values(point) in known:
            point = self._random_point(int(trial_id))
        self._points[trial_id] = point
        return self._values(point)

    def _random_point(self, number: int) -> dict[str, float]:
        dice = np.random.default_rng((self._seed, number))
        return {key: float(dice.uniform(low, high)) for key, (low, high) in self._bounds.items()}

    def _values(self, point: Mapping[str, float]) -> dict[str, Any]:
        return {key: self._unscaled(self._dimensions[key], value) for key, value in point.items()}

    @staticmethod
    def _unscaled(dimension: Dimension, value: float) -> float:
        low, high = dimension.values[:2]
        value = min(max(math.exp(value) if dimension.verb.startswith("log") else value, low), high)
        if dimension.verb.endswith("randint"):
            return min(math.floor(value), high - 1)
        if dimension.verb == "quniform":
            return float(min(max(round(value / dimension.values[2]) * dimension.values[2], low), high))
        return float(value)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See Suggester."""
        if result is not None and _has_all(self._goal, result):
            sign = 1 if self._goal.modes[0] == "max" else -1
            self._search.optimizer.register(self._points[trial_id], sign * result[self._goal.metrics[0]])


class Tpe:
    """Ray Tune's Optuna."""

    def __init__(self, space: Space, goal: Goal, config: SearcherConfig, seed: int) -> None:
        """Of that space."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        several = len(goal.metrics) > 1
        self._goal = goal
        self._search = OptunaSearch(
            OptunaSearch.convert_search_space({d.key: domain(d) for d in space.searched}),
            metric=list(goal.metrics) if several else goal.metrics[0],
            mode=list(goal.modes) if several else goal.modes[0],
            # Keys are drawn together, for rank and rate depend on each other; trials that run at once keep apart.
            sampler=optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=config.startup_trials, multivariate=True, constant_liar=True
            ),
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """See Suggester."""
        return self._search.suggest(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See Suggester; of several objectives it takes all or none."""
        known = result if result is not None and _has_all(self._goal, result) else None
        self._search.on_trial_complete(trial_id, known, error)


def _has_all(goal: Goal, result: Mapping[str, Any]) -> bool:
    return all(result.get(metric) is not None for metric in goal.metrics)


_MISSING = "{} is not installed; pip install 'raytune_ds[search]'"


SEARCHERS: Mapping[str, Callable[[Space, Goal, SearcherConfig, int], Suggester]] = {
    "auto": Tpe,
    "optuna": Tpe,
    "bayesopt": Scaled,
    "random": lambda space, goal, config, seed: Random(space, seed),
    "grid": lambda space, goal, config, seed: Grid(space, seed),
}


def drawn(space: Space, suggestion: Mapping[str, Any]) -> Values:
    """What was suggested, as values of the config's keys."""
    return {d.key: _plain(unlabelled(d, suggestion[d.key])) for d in space.searched}


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's; lists for tuples."""
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


class Replayed(Searcher):
    """Suggests what the journal has, and then what a searcher suggests that was told all that the journal tells."""

    def __init__(
        self,
        inner: Suggester,
        space: Space,
        journal: Journal,
        has_room: Callable[[], bool],
        is_over: Callable[[], bool],
    ) -> None:
        """Tells the searcher what the journal has.

        Args:
            inner: fresh.
            space: that it searches.
            journal: of the sweep.
            has_room: whether one more trial may run now.
            is_over: whether no more trials are wanted.

        Raises:
            UserError: the searcher suggests other values than it did then.
        """
        super().__init__()
        self._inner, self._space, self._journal = inner, space, journal
        self._has_room, self._is_over = has_room, is_over
        self._known = [trial.number for trial in journal.trials]
        self._numbers: dict[str, int] = {}
        self._told: set[int] = set()
        for event in journal.events:
            if event["event"] == "trial":
                self._require_same(event["trial"], event["values"])
            elif event["event"] == "end":
                self._tell(event["trial"])

    def _require_same(self, number: int, values: Values) -> None:
        suggestion = self._inner.suggest(str(number))
        now = None if not isinstance(suggestion, dict) else drawn(self._space, suggestion)
        if now is None or any(values.get(key) != value for key, value in now.items()):
            raise UserError(
                f"trial {number:04d}: its searcher suggests other values now than it did then; it is of another "
                "version, or seed and settings of sweep.searcher have changed. Bring them back, or choose another "
                "run.name."
            )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Values of the next trial; None while there is no room for it."""
        number = len(self._numbers) + 1
        if number > len(self._known) and self._is_over():
            return Searcher.FINISHED
        if not self._has_room():
            return None
        if number <= len(self._known):
            known = self._journal.first_values(number)
            values = {d.key: known[d.key] for d in self._space.searched}
        else:
            suggestion = self._inner.suggest(str(number))
            if not isinstance(suggestion, dict):
                return suggestion
            values = drawn(self._space, suggestion)
        self._numbers[trial_id] = number
        return {"values": values}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the searcher how it ended, unless it knows."""
        self._tell(self._numbers[trial_id], failed=error)

    def _tell(self, number: int, failed: bool = False) -> None:
        if number in self._told:
            return
        self._told.add(number)
        trial = self._journal.trial(number)
        failed |= trial.status == "failed"
        result = dict(trial.last.metrics) if trial.last and not failed else None
        self._inner.on_trial_complete(str(number), result=result, error=failed)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: searchers learn from how trials end."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, either."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing, either."""
