"""The sweep section: what can be written, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.compose import compose, dump, load
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.sweepconfig import NUMBERS_OF, Dimension, Setting, SweepConfig

VERBS = "choice, uniform, loguniform, quniform, randint, lograndint, expr"
R, LR = "adapter.r", "train.learning_rate"


def config(**sweep: Any) -> Config:
    return Config.model_validate({"sweep": sweep})


def problem(**sweep: Any) -> str:
    """What is said of a section, without the key that it begins with."""
    given = {"sweep": sweep}
    with pytest.raises(UserError) as caught:
        load(json.dumps(given))
    return str(caught.value).partition(" (resolved config): ")[2]


# ---- the space ------------------------------------------------------------------------------------

ALL_VERBS = {
    R: {"choice": [8, 64]},
    "adapter.targets": {"choice": ["auto", ["q_proj", "v_proj"]]},
    LR: {"loguniform": [1e-5, 1e-3]},
    "adapter.dropout": {"uniform": [0, 0.5]},
    "train.weight_decay": {"quniform": [0, 0.5, 0.1]},
    "train.warmup_steps": {"randint": [0, 10]},
    "train.max_steps": {"lograndint": [10, 1000]},
    "adapter.alpha": {"expr": "2 * adapter.r"},
}


def test_every_verb_is_read_and_written_again() -> None:
    """As a file or a resolved config has it."""
    assert {verb for spec in ALL_VERBS.values() for verb in spec} == set(NUMBERS_OF)
    made = config(space=ALL_VERBS, trial={"train.max_steps": 7, "data.sources": ["a", "b"]})
    assert made.sweep.space is not None
    assert made.sweep.space[1] == Dimension(
        key="adapter.targets", verb="choice", values=("auto", ("q_proj", "v_proj"))
    )
    assert made.sweep.space[-1].values == ("2 * adapter.r",)
    assert made.model_dump(mode="json")["sweep"]["space"] == ALL_VERBS
    assert load(dump(made)) == made
    assert hash(load(dump(made))) == hash(made)
    assert hash(made) != hash(config(space=ALL_VERBS))


def test_keys_are_written_nested_or_dotted() -> None:
    """In a file, and in parts on the command line."""
    r, dropout = {"choice": [8]}, {"uniform": [0, 0.5]}
    dotted = config(
        space={R: r, "adapter.dropout": dropout}, trial={"data.eval.fraction": 0.1, "train.max_steps": 7}
    )
    nested = {
        "space": {"adapter": {"r": r, "dropout": dropout}},
        "trial": {"data": {"eval": {"fraction": 0.1}}, "train": {"max_steps": 7}},
    }
    assert config(**nested) == dotted
    parts = ("space.adapter.r.choice=[8]", "space.adapter.dropout={uniform: [0, 0.5]}")
    trial = ("trial.data.eval.fraction=0.1", "trial.train.max_steps=7")
    assert compose([], [f"sweep.{part}" for part in (*parts, *trial)]) == dotted
    whole = "sweep.space={adapter.r: {choice: [8]}, adapter.dropout: {uniform: [0, 0.5]}}"
    assert compose([], [whole]).sweep.space == dotted.sweep.space


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "searches nothing; name keys, or leave it out for the default space"),
        (R, "takes keys and what is searched of them: {adapter.r: {choice: [8, 64]}}"),
        ([R], "takes keys and what is searched of them: {adapter.r: {choice: [8, 64]}}"),
        ([{"key": R, "verb": "choice", "values": []}], "takes keys and what is searched of them: "),
        ({R: 8}, f"adapter.r: write one of {VERBS}, such as {{choice: [8, 16]}}"),
        ({R: None}, "adapter.r: write one of "),
        ({R: {}}, "adapter.r: write one of "),
        ({"adapter": {"r": [8, 16]}}, "adapter.r: write one of "),
        ({R: {"choise": [8]}}, f"adapter.r: choise is none of {VERBS}"),
        ({R: {"choice": [8], "randint": [1, 9]}}, "adapter.r: has choice and randint; write one of "),
        ({R: {"choice": [8]}, "adapter": {"r": {"choice": [9]}}}, "adapter.r: is named twice"),
        ({R: {"choice": []}}, "adapter.r: choice takes a list of values"),
        ({R: {"choice": 8}}, "adapter.r: choice takes a list of values"),
        ({R: {"randint": [8]}}, "adapter.r: randint takes [low, high]"),
        ({R: {"randint": [True, 8]}}, "adapter.r: randint takes [low, high]"),
        ({R: {"randint": [1.5, 8]}}, "adapter.r: randint takes whole numbers"),
        ({R: {"lograndint": [0, 8]}}, "adapter.r: lograndint begins at 0; a logarithmic range begins above 0"),
        ({LR: {"loguniform": [0.0, 1]}}, "train.learning_rate: loguniform begins at 0.0; a logarithmic "),
        ({LR: {"uniform": ["a", 1]}}, "train.learning_rate: uniform takes [low, high]"),
        ({LR: {"uniform": [0, float("inf")]}}, "train.learning_rate: uniform takes [low, high]"),
        ({LR: {"uniform": [0, float("nan")]}}, "train.learning_rate: uniform takes [low, high]"),
        ({LR: {"uniform": [2, 1]}}, "train.learning_rate: uniform runs from 2 to 1; write the lower bound first"),
        ({LR: {"uniform": [1, 1]}}, "train.learning_rate: uniform runs from 1 to 1; write the lower bound first"),
        ({LR: {"quniform": [0, 1]}}, "train.learning_rate: quniform takes [low, high, step]"),
        ({LR: {"quniform": [0, 1, 0]}}, "train.learning_rate: quniform takes a step above 0"),
        ({LR: {"quniform": [1, 10, 4]}}, "quniform runs from 1 to 10 in steps of 4; both bounds have to be multiples"),
        ({R: {"expr": ""}}, "adapter.r: expr takes a formula, such as 2 * adapter.r"),
        ({R: {"expr": 8}}, "adapter.r: expr takes a formula, such as 2 * adapter.r"),
    ],
)  # fmt: skip
def test_mistakes_of_form_are_told(space: Any, message: str) -> None:
    """Before anything is known of the keys."""
    assert message in problem(space=space)


def test_all_mistakes_are_told_at_once_with_their_place(tmp_path: Path) -> None:
    """The line is that of the space."""
    file = tmp_path / "a.yaml"
    file.write_text("sweep:\n  space:\n    adapter.r: {choice: []}\n    adapter.alpha: {uniform: [2, 1]}\n")
    with pytest.raises(UserError) as caught:
        compose([file], [])
    assert str(caught.value).startswith(f"sweep.space = a mapping ({file}, line 4): adapter.r: choice ")
    assert "; adapter.alpha: uniform runs from 2 to 1" in str(caught.value)


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (["train.max_steps"], "takes keys and their values: {train.max_steps: 100}"),
        (None, "takes keys and their values: {train.max_steps: 100}"),
        ({"train.max_steps": 1, "train": {"max_steps": 2}}, "train.max_steps: is named twice"),
    ],
)
def test_mistakes_in_the_settings_of_trials_are_told(trial: Any, message: str) -> None:
    """Which are checked as settings later."""
    assert problem(trial=trial) == message


# ---- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "mode", "modes"),
    [
        ("eval_loss", "auto", ("min",)),
        ("tokens_per_s", "auto", ("max",)),
        (["eval_loss", "tokens_per_s", "seconds"], "auto", ("min", "max", "min")),
        ("loss", "max", ("max",)),
        (["loss", "tokens"], ["max", "min"], ("max", "min")),
    ],
)
def test_each_metric_has_its_mode(metric: Any, mode: Any, modes: tuple[str, ...]) -> None:
    """A single one needs no list."""
    made = config(metric=metric, mode=mode)
    assert made.sweep.modes == modes
    assert load(dump(made)).sweep == made.sweep


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"metric": []}, "names one metric, or several different ones"),
        ({"metric": ["loss", "loss"]}, "names one metric, or several different ones"),
        ({"metric": "accuracy"}, "must be eval_loss, loss, trainable_parameters, tokens, seconds or tokens_per_s"),
        ({"metric": ["loss", "tokens"], "mode": "min"}, "there are 2 metrics (loss, tokens); name a mode for each"),
        ({"mode": "lowest"}, "must be min, max or auto"),
        ({"metric": ["loss", "tokens"], "searcher": {"kind": "bayesopt"}}, "bayesopt has one objective"),
        *(
            ({"scheduler": {"kind": s}, "searcher": {"kind": k}}, f"scheduler {s} draws its population at once; set")
            for s in ("pbt", "pb2") for k in ("optuna", "bayesopt", "grid")
        ),
        ({"budget": {"money": 5}}, "needs sweep.budget.price_per_hour, which `raytune-ds render` names"),
        ({"budget": {"hours": 0}}, "must be greater than 0 or null"),
        ({"budget": {"tokens": 0}}, "must be at least 1 or null"),
        ({"trials": 0}, "must be at least 1 or auto"),
        ({"trials": True}, "takes a number, not true or false"),
        ({"scheduler": {"reduction_factor": 1}}, "must be greater than 1"),
        ({"scheduler": {"quantile_fraction": 0.6}}, "must be at most 0.5"),
        ({"give_up_after": 0}, "must be at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sweep: dict[str, Any], message: str) -> None:
    """With what would."""
    assert message in problem(**sweep)


@pytest.mark.parametrize("searcher", ["auto", "random"])
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_population_is_drawn_at_random(scheduler: str, searcher: str) -> None:
    """Whether that is said or not."""
    assert config(scheduler={"kind": scheduler}, searcher={"kind": searcher})


def test_what_is_made_in_python_needs_no_form() -> None:
    """The parts of a section can be given as they are."""
    made = SweepConfig(
        space=(Dimension(key=R, verb="choice", values=(8,)),),
        trial=(Setting(key="train.max_steps", value=7),),
    )
    assert made == config(space={R: {"choice": [8]}}, trial={"train.max_steps": 7}).sweep
