"""What is left at the end of a pass: "auto" is filled in, and what always holds is set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from raytune_ds.engines.ds.keys import AUTO, ZERO
from raytune_ds.engines.ds.work import Work
from raytune_ds.problems import shortened

QUIET = 2**31 - 1  # steps between two lines that DeepSpeed prints

# Sections in which "auto" may stand for DeepSpeed's own default: its models drop it from what they are given.
_DEFAULT_FOR_AUTO = (ZERO, f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param", "bf16", "aio")

# What the Hugging Face trainer and accelerate put in for "auto", from the model's hidden size.
FROM_HIDDEN_SIZE: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
_FALSE_FOR_AUTO = ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save")

# Filled in once the facts are all known.
_LATER = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "bf16.enabled",
    *(f"{ZERO}.{name}" for name in FROM_HIDDEN_SIZE),
}


def fill_autos(work: Work) -> None:
    """Fills "auto" as the Hugging Face trainer does; where that leaves it to DeepSpeed, its default is taken."""
    zero, hidden = work.values[ZERO], work.facts.hidden_size
    for name, size in FROM_HIDDEN_SIZE.items():
        if zero.get(name) == AUTO and name.startswith("stage3") and zero["stage"] < 3:
            del zero[name]
        elif zero.get(name) == AUTO and hidden is not None:
            zero[name] = size(hidden)
    for name in _FALSE_FOR_AUTO:
        if zero.get(name) == AUTO:
            zero[name] = False
    dropped = [key for section in _DEFAULT_FOR_AUTO for key in _autos_in(work, section)]
    for key in dropped:
        work.pop(key)
    if dropped:
        work.note(f'{", ".join(dropped)} = "auto" in {work.file}: DeepSpeed\'s default is taken')


def _autos_in(work: Work, section: str) -> Iterator[str]:
    for name, value in (work.get(section) or {}).items():
        key = f"{section}.{name}"
        if value == AUTO and key != "bf16.enabled" and name not in FROM_HIDDEN_SIZE:
            yield key


def gathered(work: Work) -> None:
    """What stage 3 may hold gathered, and update at a time, where the file is silent: an eighth of the parameters.

    DeepSpeed's own limits are 10^9, so that every rank would hold all of a model below that, and its share of the
    gradient twice, which stage 3 is there to avoid.
    """
    zero, total = work.values[ZERO], work.facts.num_parameters
    if zero["stage"] == 3 and total is not None:
        for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "sub_group_size"):
            if name.removeprefix("stage3_") not in zero:  # DeepSpeed reads both, but not both at once
                zero.setdefault(name, min(10**9, total // 8))


def always(work: Work) -> None:
    """What holds whatever the file says."""
    if work.pop("activation_checkpointing"):
        work.note(
            f"activation_checkpointing in {work.file} has no effect here or in the Hugging Face trainer; "
            "train.activation_checkpointing has"
        )
    if work.told("wall_clock_breakdown") is None:
        work.put("wall_clock_breakdown", False)
    work.values |= {
        "steps_per_print": QUIET,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def leftover_autos(work: Work) -> None:
    """Refuses an "auto" that nobody fills in."""
    for path in _autos(work.values, ()):
        key = ".".join(path)
        if key in _LATER:
            continue
        work.problems.append(
            f'{shortened(json.dumps(key)[1:-1], 80)} = "auto" in {work.file}: nothing is known that could be filled '
            "in; write a value, or leave it out"
        )


def _autos(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if tree == AUTO:
        yield path
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _autos(value, (*path, name))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _autos(value, (*path, str(index)))
