"""What the config decides: optimizer, learning rate, number format and batches; the file must say the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from raytune_ds.engines.ds.keys import AUTO, OPTIMIZER_PARAMS, SCHEDULER_PARAMS
from raytune_ds.engines.ds.read import as_number, enabled, read_section
from raytune_ds.engines.ds.work import Work, shown
from raytune_ds.problems import shortened


def _against(work: Work, key: str, our_key: str, ours: Any) -> None:
    """Refuses a number of the file that is not ours."""
    given = work.told(key)
    if given is not None and ours is not None and not _same(given, ours):
        work.problem(
            key,
            f', {our_key} = {shown(ours)} in the config: write "auto" in the file, or set {our_key}={shown(given)}',
        )


def _same(a: Any, b: Any) -> bool:
    one, other = as_number(a), as_number(b)
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9)


# ---- optimizer ----

_OPTIMIZER_TRAIN = {
    "lr": "learning_rate",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}
# Flags of DeepSpeed's and torch's Adam, and the value that plain AdamW has.
_ADAMW_FLAGS = {"bias_correction": True, "fp32_optimizer_states": True, "amsgrad": False, "maximize": False}


def optimizer(work: Work) -> None:
    """The optimizer is built by the engine: the section is checked and left out."""
    kind = work.get("optimizer.type") or AUTO
    if kind.lower() in ("adam", "adamw", AUTO):
        read_section(work, "optimizer.params", OPTIMIZER_PARAMS)
        _adamw_flags(work, kind)
    else:
        work.problem(
            "optimizer.type", ": every engine trains with AdamW; write that, or leave the section out"
        )
        read_section(work, "optimizer.params", OPTIMIZER_PARAMS, others=True)
    for name, ours in _OPTIMIZER_TRAIN.items():
        _against(work, f"optimizer.params.{name}", f"train.{ours}", getattr(work.facts.train, ours))
    _betas(work)
    if any(work.told(f"optimizer.params.{name}") is not None for name in (*_OPTIMIZER_TRAIN, "betas")):
        work.note(
            f"optimizer in {work.file} is left out: AdamW is built from train.learning_rate and its neighbours, "
            "with which it agrees"
        )
    work.pop("optimizer")


def _adamw_flags(work: Work, kind: str) -> None:
    """What would be another optimizer under the name of Adam."""
    train = work.facts.train
    for name, usual in _ADAMW_FLAGS.items():
        key = f"optimizer.params.{name}"
        if work.told(key) not in (None, usual):
            work.problem(key, ": every engine trains with plain AdamW; leave it out")
    # DeepSpeed's Adam is AdamW unless it is told otherwise, its AdamW is always. Without decay both are the same.
    key = "optimizer.params.adam_w_mode"
    if kind.lower() == "adam" and work.get(key) is False and train.weight_decay:
        work.problem(
            key,
            f", train.weight_decay = {train.weight_decay:g} in the config: that is Adam with L2 regularisation, "
            "and every engine trains with AdamW; leave it out",
        )


def _betas(work: Work) -> None:
    betas, train = work.told("optimizer.params.betas"), work.facts.train
    if betas is None or betas == [AUTO, AUTO]:
        return
    ours = [train.adam_beta1, train.adam_beta2]
    if len(betas) != 2 or not all(b == AUTO or _same(b, o) for b, o in zip(betas, ours, strict=True)):
        work.problem(
            "optimizer.params.betas",
            f", train.adam_beta1 = {ours[0]:g} and train.adam_beta2 = {ours[1]:g} in the config: "
            'make them equal, or write "auto" in the file',
        )


# ---- learning rate ----

# DeepSpeed's schedulers, and what they are called in train.lr_scheduler_type.
_SCHEDULERS = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
_HELD_AGAINST_OURS = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")


def scheduler(work: Work) -> None:
    """The learning rate of each step is set by the loop: the section is checked and left out."""
    read_section(work, "scheduler.params", SCHEDULER_PARAMS, others=True)
    train, facts = work.facts.train, work.facts
    _against(work, "scheduler.params.warmup_max_lr", "train.learning_rate", train.learning_rate)
    total = facts.total_steps if facts.total_steps is not None else train.max_steps
    _steps(work, "total_num_steps", total, "the run has {} optimizer steps", "train.max_steps")
    warmup = facts.warmup_steps if facts.warmup_steps is not None else train.warmup_steps
    # DeepSpeed refuses a warm-up of no steps, so 1 may stand for it.
    if warmup != 0 or work.get("scheduler.params.warmup_num_steps") != 1:
        _steps(work, "warmup_num_steps", warmup, "the warm-up takes {} optimizer steps", "train.warmup_steps")
    other = list(_other_course(work))
    if other or any(work.told(f"scheduler.params.{name}") is not None for name in _HELD_AGAINST_OURS):
        said = f" ({', '.join(other)})" if other else ""
        work.note(
            f"scheduler in {work.file} is left out{said}: the learning rate follows "
            f"train.lr_scheduler_type = {train.lr_scheduler_type} and its neighbours"
        )
    work.pop("scheduler")


def _steps(work: Work, name: str, ours: int | None, sentence: str, our_key: str) -> None:
    key = f"scheduler.params.{name}"
    given = work.told(key)
    if given is not None and ours is not None and given != ours:
        work.problem(
            key, f', but {sentence.format(ours)}: write "auto" in the file, or set {our_key}={shown(given)}'
        )


def _other_course(work: Work) -> Iterator[str]:
    """What the file says of the learning rate that ours does not follow."""
    kind = work.told("scheduler.type")
    if kind is not None and _SCHEDULERS.get(kind.lower()) != work.facts.train.lr_scheduler_type:
        yield f"type = {shown(kind)}"
    for name, value in (work.get("scheduler.params") or {}).items():
        usual = {"warmup_min_lr": 0, "warmup_type": "linear"}.get(name, AUTO)
        if name not in _HELD_AGAINST_OURS and value not in (AUTO, usual):
            yield f"{shortened(json.dumps(name)[1:-1])} = {shown(value)}"


# ---- number formats ----


def precision(work: Work) -> None:
    """bfloat16 or float32, as model.dtype has it."""
    if enabled(work.get("fp16")):
        work.problem(
            "fp16.enabled",
            ": training computes in bfloat16 or float32; write false and set model.dtype=bfloat16 or float32",
        )
    given, ours = work.told("bf16.enabled"), work.facts.bf16
    if given is not None and ours is not None and given != ours:
        formats = ("float32", "bfloat16")
        work.problem(
            "bf16.enabled",
            f", but this run computes in {formats[ours]} (model.dtype): set model.dtype={formats[given]}, "
            'or write "auto" in the file',
        )
    work.put("bf16.enabled", AUTO if ours is None else ours)
    work.put("fp16", {"enabled": False})


_FORMATS = {"bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32", "float": "fp32"}


def gradient_formats(work: Work) -> None:
    """Gradients are summed in no coarser format than they were computed in."""
    bf16 = work.facts.bf16
    for key in ("communication_data_type", "data_types.grad_accum_dtype"):
        value = work.told(key)
        if value is None:
            continue
        name = _FORMATS.get(str(value).lower().removeprefix("torch."))
        if name == "fp32" or (name == "bf16" and bf16 is not False):
            work.put(key, name)
            continue
        computed, choice = ("float32", '"fp32"') if bf16 is False else ("bfloat16", '"fp32" or "bf16"')
        if bf16 is None:
            computed = "bfloat16 or float32"
        work.problem(
            key, f": gradients are computed in {computed} (model.dtype); write {choice}, or leave it out"
        )


# ---- batches ----


def batches(work: Work) -> None:
    """Batches are ours, counted in packs; what the file says must be the same."""
    facts, train = work.facts, work.facts.train
    _against(work, "train_batch_size", "train.global_batch", facts.global_batch or train.global_batch)
    _against(work, "gradient_clipping", "train.max_grad_norm", train.max_grad_norm)
    _micro_batch(work)
    key = "gradient_accumulation_steps"
    given, ours = work.told(key), facts.accumulation
    if given is not None and ours is not None and given != ours:
        world = "" if facts.world_size is None else f" and {facts.world_size} workers"
        work.problem(
            key,
            f", but train.global_batch = {train.global_batch}, train.micro_batch = {train.micro_batch}{world} make "
            f'{ours}: write "auto" in the file',
        )
    work.pop("train_batch_size")  # DeepSpeed's own product of the others, which need not be our global batch
    for key, value in (
        ("train_micro_batch_size_per_gpu", facts.micro_batch),
        ("gradient_accumulation_steps", facts.accumulation),
        ("gradient_clipping", train.max_grad_norm),
    ):
        work.put(key, AUTO if value is None else value)


def _micro_batch(work: Work) -> None:
    key, set_to = "train_micro_batch_size_per_gpu", work.facts.train.micro_batch
    given, ours = work.told(key), work.facts.micro_batch
    if given is None or given == ours:
        return
    if set_to != AUTO:  # may be more than ours, which is a worker's whole share at most
        _against(work, key, "train.micro_batch", set_to)
    elif ours is not None:
        work.problem(
            key,
            f", train.micro_batch = auto in the config, which makes {ours} (packs of data.seq_len tokens): "
            f'write "auto" in the file, or set train.micro_batch={given}',
        )
