"""The space of a sweep: what is accepted can be trained, and what is refused is told before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from raytune_ds.compose import overridden
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.sweep import space as module
from raytune_ds.sweep.search import Random, drawn
from raytune_ds.sweep.space import (
    DEFAULTS,
    MUTABLE,
    Space,
    check_space,
    label,
    mutable,
    num_trials,
    shown,
    trial_base,
    unlabelled,
)

R, LR, ALPHA, DROPOUT = "adapter.r", "train.learning_rate", "adapter.alpha", "adapter.dropout"
SOME_R: dict[str, Any] = {R: {"choice": [8, 64]}}


@pytest.fixture(autouse=True, scope="module")
def few_combinations() -> Iterator[None]:
    """These spaces are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TRIED", 30)
        yield


def config(space: dict[str, Any] | None = None, sweep: dict[str, Any] | None = None, **more: Any) -> Config:
    return Config.model_validate({"sweep": {"space": space, **(sweep or {})}, **more})


def problems(space: dict[str, Any] | None, **more: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_space(config(space, **more))
    return str(caught.value).splitlines()


# ---- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_rank", "unknown key; did you mean adapter.r?"),
        ("train.lr", "unknown key; did you mean train.learning_rate?"),
        ("adapter.dropuot", "unknown key; did you mean adapter.dropout?"),
        ("surely.unknown", "unknown key; --help lists all keys"),
        ("adapter", "unknown key; "),
        *(
            (key, "can't be set for a trial; set it for the whole sweep")
            for key in ("run.name", "run.storage", "run.resume", "cluster.max_nodes", "sweep.trials", "tracking.to")
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["sweep.space", "sweep.trial"])
def test_keys_that_are_none(key: str, said: str, place: str) -> None:
    """Searched, or set for all trials."""
    if place == "sweep.space":
        found = problems({key: {"choice": [1]}, **SOME_R})
    else:
        found = problems(SOME_R, sweep={"trial": {key: 1}})
    assert len(found) == 1
    assert found[0].startswith(f"{key} ({place}): {said}")


def test_all_keys_that_are_wrong_are_told_at_once() -> None:
    """A key that is searched can't be set, too."""
    found = problems(
        {"lora_r": {"choice": [1]}, "run.name": {"choice": ["a"]}, **SOME_R}, sweep={"trial": {R: 8}}
    )
    assert [line.partition(" ")[0] for line in found] == ["lora_r", "run.name", R]
    assert found[2] == "adapter.r (sweep.trial): is searched too; name it in one place only"


def test_a_list_is_searched_as_a_whole() -> None:
    """A formula could not find its way into it."""
    (found,) = problems({"data.sources.0.path": {"choice": ["a", "b"]}})
    assert found == "data.sources.0.path (sweep.space): is a part of a list, which is searched as a whole"
    check_space(config({"data.sources": {"choice": [["a"], [{"path": "b"}], {"path": "c"}]}}))


# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "lines"),
    [
        ({R: {"choice": [0, 8, -1]}}, [f"{R} = 0 (sweep.space): must be at least 1", f"{R} = -1 (sweep.space): must "]),
        ({R: {"randint": [0, 9]}}, [f"{R} = 0 (sweep.space): must be at least 1"]),
        ({R: {"uniform": [4, 64]}}, [f"{R} = 26.0"]),  # a fraction between whole bounds
        ({R: {"loguniform": [4, 64]}}, [f"{R} = 26.0"]),
        ({R: {"quniform": [4, 8, 0.5]}}, [f"{R} = 4.5 (sweep.space): must be a whole number"]),
        ({DROPOUT: {"uniform": [-0.1, 0.5]}}, [f"{DROPOUT} = -0.1 (sweep.space): must be at least 0"]),
        ({DROPOUT: {"uniform": [0, 1]}}, [f"{DROPOUT} = 1 (sweep.space): must be less than 1"]),
        ({"data.eval.fraction": {"quniform": [0, 0.75, 0.25]}}, ["data.eval.fraction = 0.75 (sweep.space): must be a"]),
        ({"adapter.bias": {"choice": ["none", "al"]}}, ["adapter.bias = al (sweep.space): must be none, all or lora"]),
        ({LR: {"choice": ["fast"]}}, [f"{LR} = fast (sweep.space): must be a number"]),
        ({"train.max_steps": {"choice": [None, True]}}, ["train.max_steps = true (sweep.space): takes a number, not"]),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_told(space: dict[str, Any], lines: list[str]) -> None:
    """Those of a range are known by its ends."""
    found = problems(space)
    assert len(found) == len(lines)
    for line, beginning in zip(found, lines, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    "space",
    [
        {R: {"randint": [1, 9]}},
        {R: {"lograndint": [1, 2]}},
        {R: {"quniform": [4, 64, 4]}},
        {DROPOUT: {"randint": [0, 1]}},
        {"train.max_steps": {"choice": [None, 5]}},
        {"train.micro_batch": {"choice": ["auto", 1, 16]}},
        {"adapter.targets": {"choice": ["auto", ["q_proj", "v_proj"]]}},
        {"model.name": {"choice": ["tiny:qwen2", "tiny:llama"]}, LR: {"uniform": [1e-5, 1]}},
    ],
)
def test_what_fits_is_accepted(space: dict[str, Any]) -> None:
    """The upper end of whole numbers is none of them."""
    assert check_space(config(space)).keys == tuple(space)


def test_combinations_that_do_not_go_together_are_told() -> None:
    """Each value goes with the first of the other key."""
    found = problems({"train.micro_batch": {"choice": [4, 8]}, "train.global_batch": {"choice": [8, 4]}})
    assert found == [
        "train.micro_batch = 8 (sweep.space): is more than train.global_batch (4); lower it, raise the other or "
        "say auto"
    ]


def test_few_of_many_combinations_are_told() -> None:
    """Who reads more than five?"""
    space = {
        "train.global_batch": {"choice": [64, 4]},
        "train.micro_batch": {"choice": [*range(1, 9), *range(20, 60)]},
    }
    assert len(problems(space)) == 5


def test_settings_of_trials_that_do_not_fit_are_told() -> None:
    """Once, and with the name of their place."""
    found = problems(SOME_R, sweep={"trial": {"train.max_steps": 0}})
    assert found[0] == "train.max_steps = 0 (sweep.trial): must be at least 1 or null"


# ---- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("2 * adapter.r", 128),
        ("adapter.r / 2", 32.0),
        ("adapter.r ** 0.5", 8.0),
        ("32 if adapter.r > 16 else 16", 32),
        ("[adapter.r, 100] | max", 100),
        ("train.max_steps * train.global_batch", 160),  # of the base, and of all trials
    ],
)
def test_formulas_are_of_all_keys(formula: str, value: float) -> None:
    """Drawn, set for all trials, or left as they are."""
    given = config({**SOME_R, ALPHA: {"expr": formula}}, {"trial": {"train.max_steps": 10}})
    space, base = check_space(given), trial_base(given)
    values = space.complete(base, {R: 64})
    assert values == {R: 64, ALPHA: value}
    trial = overridden(trial_base(given), values, "sweep.space")
    assert (trial.adapter.r, trial.adapter.alpha, trial.train.max_steps) == (64, value, 10)


def test_formulas_may_follow_from_formulas_before_them() -> None:
    """In the order they are written in."""
    space = Space.of(
        config({**SOME_R, ALPHA: {"expr": "2 * adapter.r"}, "train.max_steps": {"expr": "adapter.alpha + 1"}})
    )
    assert space.complete(Config(), {R: 4}) == {R: 4, ALPHA: 8, "train.max_steps": 9}


@pytest.mark.parametrize(
    "formula",
    [
        "nothing",
        "2 * nothing.r",
        "adapter.rank",
        "2 *",
        "adapter.r / 0",
        "adapter.r | nothing",
        "'a' + 1",
        "'{a}'.format()",
        "'a' * 99999999999999",
        "adapter",
        "().__class__",
        "adapter.r.__class__.__mro__",
        "cycler.__init__.__globals__.os.system('true')",
        "lipsum.__globals__",
    ],
)
def test_formulas_without_a_value_are_told(formula: str) -> None:
    """Nor is there a way out of them."""
    for line in problems({**SOME_R, ALPHA: {"expr": formula}}):
        assert line.startswith(
            (f"{ALPHA} ({module.WHERE}): the formula ", f"{ALPHA} = a mapping (sweep.space)")
        )


def test_a_value_of_a_formula_is_checked_like_any_other() -> None:
    """Though nobody wrote it."""
    found = problems({R: {"choice": [8, 16]}, "train.micro_batch": {"expr": "2 * adapter.r"}})
    assert found == [
        "train.micro_batch = 32 (sweep.space): is more than train.global_batch (16); lower it, raise the other or "
        "say auto"
    ]
    assert problems({ALPHA: {"expr": "2 * adapter.r"}}) == [
        "sweep.space: has formulas only; name a key with choices or a range"
    ]


# ---- defaults, and what is made of a space --------------------------------------------------------


@pytest.mark.parametrize(("adapter", "name"), [("lora", "lora"), ("vera", "other"), ("none", "full")])
def test_there_is_a_default_space(adapter: str, name: str) -> None:
    """For what is trained."""
    base = config(adapter={"kind": adapter})
    space = check_space(base)
    assert set(space.keys) == set(DEFAULTS[name])
    assert {d.key: d.verb for d in space.searched + space.formulas} == {
        key: verb for key, spec in DEFAULTS[name].items() for verb in spec
    }
    assert mutable(space, "pbt")
    if name == "lora":
        assert all(space.complete(base, point)[ALPHA] == 2 * point[R] for _, point in space.corners())


def test_the_grid_has_every_combination_in_order() -> None:
    """As many trials are run, unless fewer are wanted."""
    space = {R: {"choice": [4, 8]}, ALPHA: {"expr": "adapter.r"}, DROPOUT: {"choice": [0.0, 0.1, 0.2]}}
    grid = {"searcher": {"kind": "grid"}}
    found = check_space(config(space, grid))
    assert [found.grid_point(i) for i in range(found.grid_size)] == [
        {R: r, DROPOUT: dropout} for r in (4, 8) for dropout in (0.0, 0.1, 0.2)
    ]
    assert [num_trials(config(space, grid | {"trials": n}), found) for n in ("auto", 4, 6, 99)] == [
        6,
        4,
        6,
        6,
    ]
    assert [num_trials(config(space, {"trials": n}), found) for n in ("auto", 4, 99)] == [
        module.TRIALS,
        4,
        99,
    ]


def test_corners_meet_each_value_of_each_key() -> None:
    """With the first of the others."""
    space = Space.of(config({R: {"choice": [4, 8]}, "train.max_steps": {"randint": [10, 20]}}))
    assert list(space.corners()) == [
        (R, {R: 4, "train.max_steps": 10}),
        (R, {R: 8, "train.max_steps": 10}),
        ("train.max_steps", {R: 4, "train.max_steps": 10}),
        ("train.max_steps", {R: 4, "train.max_steps": 19}),
    ]


@pytest.mark.parametrize(
    ("space", "sweep", "line"),
    [
        ({LR: {"uniform": [1e-5, 1e-3]}}, {"searcher": {"kind": "grid"}}, f"{LR} (sweep.space): uniform has no grid; "),
        (SOME_R, {"searcher": {"kind": "bayesopt"}}, f"{R} (sweep.space): bayesopt searches numbers, not choices; "),
        (SOME_R, {"scheduler": {"kind": "pbt"}}, "sweep.scheduler.kind = pbt: none of the searched keys can change"),
        ({LR: {"choice": [1e-4, 1e-3]}}, {"scheduler": {"kind": "pb2"}}, "sweep.scheduler.kind = pb2: none of the "),
    ],
)  # fmt: skip
def test_what_a_searcher_or_a_scheduler_cannot_search(
    space: dict[str, Any], sweep: dict[str, Any], line: str
) -> None:
    """With what to do."""
    (found,) = problems(space, sweep=sweep)
    assert found.startswith(line)


def test_which_keys_change_as_trials_go_on() -> None:
    """Choices do for pbt, and not for pb2."""
    space = Space.of(
        config({**SOME_R, LR: {"choice": [1e-4, 1e-3]}, "train.weight_decay": {"uniform": [0, 0.1]}})
    )
    assert [d.key for d in mutable(space, "pbt")] == [LR, "train.weight_decay"]
    assert [d.key for d in mutable(space, "pb2")] == ["train.weight_decay"]
    check_space(config({key: {"uniform": [0.1, 0.2]} for key in MUTABLE}, {"scheduler": {"kind": "pb2"}}))


@pytest.mark.parametrize(
    "choices",
    [[["a", "b"], "auto"], [None, 5], [1, True, 0, False], [{"path": "a"}, [{"path": "a"}]], [1, 1.0]],
)
def test_a_choice_is_known_by_its_label(choices: list[Any]) -> None:
    """Which can be hashed, whatever the choice is."""
    (dimension,) = Space.of(config({"data.sources": {"choice": choices}})).searched
    for value in dimension.values:
        hash(label(value))
        found = unlabelled(dimension, label(value))
        assert (found, type(found)) == (value, type(value))


def test_values_in_a_few_words() -> None:
    """Short enough for a line."""
    assert (
        shown({R: 8, LR: 0.000123456, "adapter.targets": ["a", "b"], "train.max_steps": None})
        == "r=8 learning_rate=0.000123 targets=a+b max_steps=None"
    )


# ---- whatever is accepted composes ----------------------------------------------------------------

FRACTIONS = (
    DROPOUT,
    LR,
    "train.weight_decay",
    "train.warmup_ratio",
    "train.adam_beta1",
    "data.eval.fraction",
)
WHOLE = (R, "train.warmup_steps", "train.global_batch", "train.micro_batch", "data.seq_len")
number = st.integers(-1, 40) | st.floats(-0.5, 2, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def dimensions(draw: st.DrawFn) -> dict[str, Any]:
    verb = draw(st.sampled_from(["choice", "uniform", "loguniform", "quniform", "randint", "lograndint"]))
    if verb == "choice":
        return {verb: draw(st.lists(number, min_size=1, max_size=3))}
    if verb == "quniform":
        step = draw(st.sampled_from([0.1, 0.25, 0.5, 1, 2, 3]))
        low = draw(st.integers(0, 5))
        return {verb: [low * step, (low + draw(st.integers(1, 9))) * step, step]}
    ends = st.integers(0, 40) if verb.endswith("randint") else number
    return {verb: sorted((draw(ends), draw(ends)))}


spaces = st.dictionaries(st.sampled_from((*FRACTIONS, *WHOLE)), dimensions(), min_size=1, max_size=3)


@given(spaces, st.integers(0, 1000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_any_trial_of_a_space_that_is_accepted_composes(space: dict[str, Any], seed: int) -> None:
    """Whatever is drawn."""
    try:
        base = config({**space, ALPHA: {"expr": "2 * adapter.r"}})
        found = check_space(base)
    except (UserError, ValueError):
        reject()
    search = Random(found, seed)
    for n in range(1, 6):
        values = drawn(found, search.suggest(str(n)))
        trial = found.applied(trial_base(base), values)
        assert trial.adapter.alpha == 2 * trial.adapter.r
