"""Other forms of the same: what is often written in another form than DeepSpeed reads is put right, with a note."""

from __future__ import annotations

from raytune_ds.engines.ds.keys import AUTO, ZERO, ZERO_KEYS
from raytune_ds.engines.ds.read import as_flag, as_whole
from raytune_ds.engines.ds.work import Work, shown

_RENAMED = {
    "bfloat16": "bf16",
    "aio.thread_count": "aio.intra_op_parallelism",
    f"{ZERO}.cpu_offload_params": f"{ZERO}.cpu_offload_param",
}


def shapes(work: Work) -> None:
    """Puts right what is often written in another form than DeepSpeed reads."""
    for old, new in _RENAMED.items():
        _rename(work, old, new)
    _zero_section(work)
    for key in [key for key in work.values if key in ZERO_KEYS]:
        _move_into_zero(work, key)
    for key in ("optimizer", "scheduler"):
        _wrap(work, key, "type", (str,))
    for key in ("fp16", "bf16"):
        _wrap(work, key, "enabled", (str, bool))
    for old, part in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        _deprecated_offload(work, f"{ZERO}.{old}", f"{ZERO}.{part}")
    for part in ("offload_optimizer", "offload_param"):
        _offload_section(work, f"{ZERO}.{part}")
    if as_flag(work.pop(f"{ZERO}.round_robin_gradients")) is True:
        # DeepSpeed 0.19 lays the parameters out in another order then, but finds their parts by the old one.
        work.note(
            f"{ZERO}.round_robin_gradients in {work.file} is left out: with it DeepSpeed says of its parts of the "
            "parameters that they belong to others"
        )
    if work.pop(f"{ZERO}.cpu_offload_use_pin_memory") is not None:
        work.note(f"{ZERO}.cpu_offload_use_pin_memory in {work.file} has no effect; pin_memory has")


def _rename(work: Work, old: str, new: str) -> None:
    if work.get(old) is None:
        return
    if work.get(new) is not None:
        work.problem(old, f": is another name of {new}, which is there too; keep that one")
        work.pop(old)
        return
    work.note(f"{old} in {work.file} is read as {new}, its name today")
    work.put(new, work.pop(old))


def _zero_section(work: Work) -> None:
    """`true`, `2` and `"2"` for the section; DeepSpeed takes `true` for stage 1."""
    value = work.get(ZERO)
    if value is None or isinstance(value, dict):
        return
    flag, stage = as_flag(value), as_whole(value)
    if isinstance(flag, bool) and (stage is None or isinstance(value, bool)):
        stage = (work.facts.engine.stage or 1) if flag else 0
    if stage is None and value != AUTO:
        work.problem(ZERO, ': must be a section, such as {"stage": 2}')
        work.pop(ZERO)
        return
    if stage:
        work.note(f'{work.said(ZERO)} is read as {{"stage": {stage}}}')
    work.put(ZERO, {} if stage is None else {"stage": stage})


def _move_into_zero(work: Work, key: str) -> None:
    """DeepSpeed would pass over a key of ZeRO at the top without a word."""
    if work.get(f"{ZERO}.{key}") is not None:
        work.problem(key, f": belongs into {ZERO}, where it stands too; keep that one")
        work.pop(key)
        return
    work.note(f"{work.said(key)} is read as {ZERO}.{key}, where it belongs")
    work.put(f"{ZERO}.{key}", work.pop(key))


def _wrap(work: Work, key: str, inner: str, kinds: tuple[type, ...]) -> None:
    """`"AdamW"` for `{"type": "AdamW"}`."""
    value = work.get(key)
    if isinstance(value, kinds):
        if value != AUTO:
            work.note(f'{work.said(key)} is read as {{"{inner}": {shown(value)}}}')
        work.put(key, {inner: value})


def _deprecated_offload(work: Work, old: str, new: str) -> None:
    value = as_flag(work.get(old))
    if value is None:
        return  # not there, or not understood: told with the keys
    if value is True and work.get(new) is not None:
        work.problem(old, f": is the old form of {new}, which is there too; keep that one")
    elif value is True:
        work.note(
            f'{work.said(old)} is read as {new.rpartition(".")[2]}: {{"device": "cpu"}}, its form today'
        )
        work.put(new, {"device": "cpu"})
    work.pop(old)


def _offload_section(work: Work, key: str) -> None:
    """`"cpu"` or `true` for `{"device": "cpu"}`."""
    value = work.get(key)
    if not isinstance(value, str | bool):
        return
    flag = as_flag(value)
    device = value if flag is None or flag == AUTO else ("cpu" if flag else "none")
    if device not in ("none", AUTO):
        work.note(f'{work.said(key)} is read as {{"device": {shown(device)}}}')
    work.put(key, {"device": device})
