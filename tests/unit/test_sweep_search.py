"""Searchers: what they suggest, and that a sweep which goes on after a crash searches as if there had been none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bayes_opt import bayesian_optimization
from ray.tune.search import Searcher
from threadpoolctl import threadpool_limits

from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.records import Goal
from raytune_ds.sweep.search import SEARCHERS, Replayed, Suggester, drawn
from raytune_ds.sweep.space import Space
from raytune_ds.sweepconfig import SearcherConfig
from tests.unit.test_sweep_journal import made_report

R, LR, DROPOUT = "adapter.r", "train.learning_rate", "adapter.dropout"
RANGES = {
    LR: {"loguniform": [1e-5, 1e-3]},
    DROPOUT: {"uniform": [0.0, 0.5]},
    "train.weight_decay": {"quniform": [0.0, 0.5, 0.1]},
    R: {"randint": [2, 65]},
    "train.warmup_steps": {"lograndint": [1, 30]},
}
CHOICES = {
    "adapter.targets": {"choice": ["auto", ["q_proj", "v_proj"]]},
    "train.max_steps": {"choice": [None, 20, 30]},
    "data.sources": {"choice": [{"path": "a"}, [{"path": "b"}]]},
    "model.trust_remote_code": {"choice": [True, False]},
}
SPACES = {
    "random": RANGES | CHOICES,
    "optuna": RANGES | CHOICES,
    "bayesopt": RANGES,
    "grid": CHOICES,
}
LOSS = Goal(("eval_loss",), ("min",))
BOTH = Goal(("eval_loss", "seconds"), ("min", "min"))


@pytest.fixture(autouse=True)
def quiet_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Optuna says of each option that it is new; bayesopt need not find the best model, nor the best point of it."""
    acq_max = bayesian_optimization.acq_max
    monkeypatch.setattr(bayesian_optimization, "acq_max", partial(acq_max, n_warmup=300, n_iter=2))
    process = bayesian_optimization.GaussianProcessRegressor
    monkeypatch.setattr(
        bayesian_optimization,
        "GaussianProcessRegressor",
        lambda **options: process(**{**options, "n_restarts_optimizer": 2}),
    )
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        yield


def space_of(spec: dict[str, Any]) -> Space:
    return Space.of(Config.model_validate({"sweep": {"space": spec}}))


def searcher(kind: str, space: Space | None = None, goal: Goal = LOSS, seed: int = 0) -> Suggester:
    return SEARCHERS[kind](space or space_of(SPACES[kind]), goal, SearcherConfig(startup_trials=3), seed)


def loss_of(values: dict[str, Any]) -> float:
    """Made up: the best rate is 1e-4, and rank helps."""
    return abs(math.log10(values.get(LR, 1e-3)) + 4) + 1 / values.get(R, 8) + len(str(values)) / 1000


def first(suggester: Suggester, space: Space, count: int) -> list[dict[str, Any]]:
    """The first suggestions, each of which is told of before the next."""
    found = []
    for number in range(1, count + 1):
        suggestion = suggester.suggest(str(number))
        assert isinstance(suggestion, dict)
        found.append(drawn(space, suggestion))
        suggester.on_trial_complete(str(number), {"eval_loss": loss_of(found[-1]), "seconds": 1.0})
    return found


# ---- what is suggested ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
def test_suggestions_are_of_the_space_and_follow_from_the_seed(kind: str) -> None:
    """As values of the config's own types."""
    space = space_of(SPACES[kind])
    found = first(searcher(kind), space, 8)
    for values in found:
        assert list(values) == list(SPACES[kind])
        for key, value in values.items():
            ((verb, given),) = SPACES[kind][key].items()
            if verb == "choice":
                assert value in given
                assert type(value) in (str, int, list, dict, bool, type(None))
            else:
                assert type(value) is (int if verb.endswith("randint") else float)
                assert given[0] <= value <= given[1] + 1e-9
                assert not verb.endswith("randint") or value < given[1]
                assert verb != "quniform" or math.isclose(value / 0.1, round(value / 0.1), abs_tol=1e-9)
    assert first(searcher(kind), space, 8) == found
    assert (first(searcher(kind, seed=1), space, 8) != found) == (kind != "grid")
    assert len({str(values) for values in found}) == 8


def test_random_suggestions_follow_from_the_number_alone() -> None:
    """So that a sweep can be raised, or its trials be asked for in any order."""
    suggester = searcher("random")
    assert [suggester.suggest(n) for n in "321"] == [suggester.suggest(n) for n in "123"][::-1]


@pytest.mark.parametrize("kind", ["optuna", "bayesopt"])
def test_a_searcher_learns(kind: str) -> None:
    """After a dozen trials it knows about where the best rate is."""
    space = space_of({LR: {"loguniform": [1e-7, 1e-1]}})
    rates = [values[LR] for values in first(searcher(kind, space), space, 20)]
    errors = [abs(math.log10(rate) + 4) for rate in rates]
    assert sum(errors[-8:]) < sum(errors[:8])
    assert min(errors) < 0.5


@pytest.mark.parametrize("kind", ["optuna", "bayesopt"])
def test_more_is_better_where_that_is_said(kind: str) -> None:
    """The same search of the opposite."""
    space = space_of({LR: {"loguniform": [1e-7, 1e-1]}})
    least, most = searcher(kind, space), searcher(kind, space, Goal(("tokens_per_s",), ("max",)))
    for number in map(str, range(1, 7)):
        suggestion = least.suggest(number)
        assert suggestion == most.suggest(number)
        assert suggestion is not None
        least.on_trial_complete(number, {"eval_loss": loss_of(suggestion)})
        most.on_trial_complete(number, {"tokens_per_s": -loss_of(suggestion)})


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("result", [None, {"eval_loss": None, "seconds": 1.0}])
@pytest.mark.parametrize("error", [True, False])
def test_trials_without_a_result_keep_nobody_waiting(
    kind: str, result: dict[str, Any] | None, error: bool
) -> None:
    """A searcher suggests something each time, whoever failed, reported no number, or has not ended."""
    suggester = searcher(kind, goal=BOTH if kind == "optuna" else LOSS)
    for number in range(1, 9):
        assert isinstance(suggester.suggest(str(number)), dict)
        if number != 2:
            suggester.on_trial_complete(str(number), None if error else result, error)


def test_bayesopt_does_not_try_the_same_twice() -> None:
    """Where it is sure of its optimum, or has heard nothing yet since it named it, a random point is better."""
    space = space_of({R: {"randint": [1, 200]}})
    waiting = searcher("bayesopt", space)
    found = first(waiting, space, 5)
    found += [drawn(space, waiting.suggest(str(number)) or {}) for number in range(6, 10)]
    assert len({values[R] for values in found}) == len(found)


# ---- after a crash --------------------------------------------------------------------------------


class Sweep:
    """Trials that take turns to end, three at a time, as a tuner would run them; from a journal on."""

    def __init__(
        self, journal: Journal, make: Callable[[Space], Suggester], space: Space, trials: int
    ) -> None:
        self.journal, self.space, self.trials = journal, space, trials
        self.running: list[int] = []
        self.search = Replayed(
            make(space),
            space,
            journal,
            has_room=lambda: len(self.running) < 3,
            is_over=lambda: False,
        )

    def run(self) -> dict[int, dict[str, Any]]:
        """The values of each trial."""
        values: dict[int, dict[str, Any]] = {}
        while True:
            number = len(values) + 1
            suggestion = self.search.suggest(f"id-{number}") if number <= self.trials else None
            if isinstance(suggestion, dict):
                values[number] = suggestion["values"]
                self.begin(number, values[number])
            elif self.running:
                self.end(self.running.pop(1 if len(self.running) > 1 else 0))
            else:
                return values

    def begin(self, number: int, values: dict[str, Any]) -> None:
        if self.journal.find(number) is None:
            self.journal.suggest(number, values)
        if self.journal.trial(number).status == "running":
            self.running.append(number)
        else:
            self.search.on_trial_complete(f"id-{number}")

    def end(self, number: int) -> None:
        """Each fourth one fails, and the sixth reports no number."""
        values, run = self.journal.trial(number).values, f"/t/{number}"
        loss = math.nan if number == 6 else loss_of(dict(values))
        report = made_report(1, loss, seconds=1.0 * (number % 3))
        if self.journal.decision(number, 1, run) is None:
            self.journal.report(number, report, "CONTINUE", values, run, None)
        fails = number % 4 == 0
        self.journal.end(number, "failed" if fails else "finished", "lost" if fails else None)
        self.search.on_trial_complete(f"id-{number}", {"eval_loss": -1e9}, error=fails)


@pytest.mark.parametrize(
    ("kind", "trials", "goal"),
    [("random", 12, LOSS), ("grid", 12, LOSS), ("optuna", 12, LOSS), ("optuna", 12, BOTH), ("bayesopt", 6, LOSS)],
)  # fmt: skip
def test_after_a_crash_at_any_time_the_search_goes_on_as_if_there_had_been_none(
    tmp_path: Path, kind: str, trials: int, goal: Goal
) -> None:
    """Whatever had been written by then."""

    def make(space: Space) -> Suggester:
        return searcher(kind, space, goal)

    space = space_of(SPACES[kind] if kind != "bayesopt" else {LR: RANGES[LR], R: {"randint": [2, 5]}})
    file = tmp_path / "journal.jsonl"
    undisturbed = Sweep(Journal(str(file)), make, space, trials).run()
    assert len(undisturbed) == trials
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 * trials
    for cut in range(len(lines) + 1):
        file.write_bytes(b"".join(lines[:cut]))
        assert Sweep(Journal(str(file)), make, space, trials).run() == undisturbed, cut


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path / "journal.jsonl"))


def replayed(
    journal: Journal, inner: Suggester | None = None, has_room: bool = True, is_over: bool = False
) -> Replayed:
    return Replayed(
        searcher("random") if inner is None else inner,
        space_of(SPACES["random"]),
        journal,
        lambda: has_room,
        lambda: is_over,
    )


def test_nothing_is_suggested_while_there_is_no_room(journal: Journal) -> None:
    """Nor does the searcher hear of it."""
    crowded = replayed(journal, has_room=False)
    assert [crowded.suggest("a"), crowded.suggest("b")] == [None, None]
    crowded._has_room = lambda: True
    assert crowded.suggest("c") == replayed(journal).suggest("a")


def test_a_sweep_that_is_over_still_has_its_trials(journal: Journal) -> None:
    """Those that have begun are gone on with, and no new ones."""
    values = drawn(space_of(SPACES["random"]), searcher("random").suggest("1") or {})
    journal.suggest(1, values)
    over = replayed(journal, is_over=True)
    assert over.suggest("a") == {"values": values}
    assert over.suggest("b") == Searcher.FINISHED


@pytest.mark.parametrize("change", [{"seed": 1}, {"values": {DROPOUT: 0.123}}])
def test_a_searcher_of_another_version_is_refused(journal: Journal, change: dict[str, Any]) -> None:
    """Going on with it would be another search."""
    space = space_of(SPACES["random"])
    for number in (1, 2):
        values = drawn(space, searcher("random").suggest(str(number)) or {})
        journal.suggest(number, values | (change.get("values", {}) if number == 2 else {}))
    with pytest.raises(
        UserError, match=r"trial 000[12]: its searcher suggests other values now than it did then"
    ):
        replayed(journal, searcher("random", seed=change.get("seed", 0)))


class Heard(list[tuple[str, Any, bool]]):
    """A searcher that writes down what it is told."""

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return searcher("random").suggest(trial_id) or {}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.append((trial_id, result and result["eval_loss"], error))


def test_a_searcher_hears_once_how_each_trial_ended(journal: Journal) -> None:
    """What the journal has of it counts, not what the tuner says; a failed one has no result, even if it reported."""
    heard = Heard()
    search = replayed(journal, heard)
    for number in (1, 2, 3):
        suggestion = search.suggest(f"id-{number}")
        assert isinstance(suggestion, dict)
        journal.suggest(number, suggestion["values"])
    for number in (1, 2):
        journal.report(number, made_report(1, 2.5), "CONTINUE", journal.trial(number).values, "", None)
    journal.end(1, "finished", None)
    search.on_trial_complete("id-1", {"eval_loss": 99.0})
    search.on_trial_complete("id-1", {"eval_loss": 99.0})
    journal.end(2, "failed", "lost")
    search.on_trial_complete("id-2", {"eval_loss": 99.0})
    search.on_trial_complete("id-3", error=True)  # before the journal has it
    assert heard == [("1", 2.5, False), ("2", None, True), ("3", None, True)]
    journal.end(3, "failed", "lost")
    again = Heard()
    replayed(Journal(journal._path), again)
    assert again == heard
