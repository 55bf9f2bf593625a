"""A profile as a person reads it: where the time of a step goes, largest first, on one page of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ds.console import human_count

CPU = "CPU"
OTHER = "other"
BESIDE = ("evaluation", "checkpoint")
"""What is no part of a step, but may come between two of them."""
MOST_OPERATORS = 25

PARTS = {
    "fetch": ("data wait", "waiting for the batch"),
    "forward": ("forward", "the batch to the device, the model, the loss"),
    "backward": ("backward", "gradients; what an engine sends meanwhile"),
    "collective": ("collective", "sums over the ranks, and waiting for the slowest of them"),
    "optimizer": ("optimizer", "norm, clipping and update"),
    "logging": ("metrics and logging", "metrics.jsonl, trackers, what the driver is told"),
    OTHER: ("other", "Python between these, random seeds, counting"),
}
"""The parts of a step by their phase: what a person calls them, and what they are."""


@dataclass(frozen=True)
class RankTimes:
    """What a rank measured.

    Attributes:
        seconds: of each phase, of all steps together.
        peak_memory_mib: of the rank so far.
        problem: what went wrong with its profile.
    """

    seconds: Mapping[str, float]
    peak_memory_mib: float
    problem: str | None = None


@dataclass(frozen=True)
class Operator:
    """One operator in all steps together: its calls, and the seconds in it but in no operator that it calls."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Operators:
    """All of a rank.

    Attributes:
        largest_first: each.
        kernel_s: that a GPU was computing or copying, its streams added up; None where there is no GPU.
    """

    largest_first: Sequence[Operator] = ()
    kernel_s: float | None = None


@dataclass(frozen=True)
class Profiled:
    """A profile.

    Attributes:
        run: its name.
        device: that rank 0 computes on.
        rows: of metrics.jsonl, of the profiled steps.
        before: the same of steps before them.
        ranks: of each.
        operators: of rank 0.
    """

    run: str
    device: str
    rows: Sequence[Mapping[str, Any]]
    before: Sequence[Mapping[str, Any]]
    ranks: Sequence[RankTimes]
    operators: Operators

    @property
    def seconds(self) -> float:
        """Of all steps on rank 0, without what came between them."""
        return in_steps(self.ranks[0])


def in_steps(rank: RankTimes) -> float:
    """The seconds that a rank spent in steps."""
    return sum(seconds for name, seconds in rank.seconds.items() if name not in BESIDE)


def page(profiled: Profiled) -> str:
    """The whole page.

    Raises:
        ValueError: no step was computed.
    """
    if not profiled.rows or not profiled.seconds:
        raise ValueError("none of its steps was computed")
    blocks = [_head(profiled), _parts(profiled), _between(profiled), _ranks(profiled), _operators(profiled)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def span(first: int, last: int) -> str:
    """`step 5`, or `steps 5 to 8`."""
    return f"step {first}" if first == last else f"steps {first} to {last}"


def largest(profiled: Profiled) -> str:
    """The largest parts of a step, in a few words."""
    seconds = profiled.ranks[0].seconds
    parts = sorted(PARTS, key=lambda name: -seconds.get(name, 0.0))[:3]
    return ", ".join(f"{PARTS[name][0]} {_share(seconds.get(name, 0.0), profiled.seconds)}" for name in parts)


def _head(profiled: Profiled) -> str:
    rows, ranks = profiled.rows, len(profiled.ranks)
    steps = [row["step"] for row in rows]
    skipped = sum(bool(row.get("skipped")) for row in rows)
    step_s = sum(row["step_time_s"] for row in rows)
    facts = [
        f"{_ms(profiled.seconds / len(rows))} ms a step",
        f"{human_count(sum(row['tokens'] for row in rows) / step_s)} tokens/s",
    ]
    if "model_tflops" in rows[0]:
        facts.append(f"{_mean(rows, 'model_tflops'):.3g} model TFLOP/s")
    if "mfu" in rows[0]:
        facts.append(f"MFU {100 * _mean(rows, 'mfu'):.1f} %")
    facts.append(f"peak memory {max(rank.peak_memory_mib for rank in profiled.ranks):,.0f} MiB a worker")
    counts = f"{_counted(ranks, 'worker')}; {_counted(len(rows), 'step')}"
    if skipped:
        counts += f", {skipped} of them skipped"
    lines = [
        f"# Where the time of a step goes: {profiled.run}, {span(min(steps), max(steps))}",
        "",
        f"{profiled.device}, {counts}. {', '.join(facts)}.",
    ]
    if profiled.before:
        usual = statistics.median(row["step_time_s"] for row in profiled.before)
        now = statistics.median(row["step_time_s"] for row in rows)
        lines.append(
            f"The profile itself takes time: the median step took {_ms(now)} ms with it, and {_ms(usual)} ms in the "
            f"{_counted(len(profiled.before), 'step')} before."
        )
    return "\n".join(lines)


def _parts(profiled: Profiled) -> str:
    seconds, steps = profiled.ranks[0].seconds, len(profiled.rows)
    rows = [
        (title, _ms(seconds.get(name, 0.0) / steps), _share(seconds.get(name, 0.0), profiled.seconds), what)
        for name, (title, what) in PARTS.items()
    ]
    clock = (
        "By the GPU's clock: a part lasts until the GPU is done with it."
        if profiled.device != CPU
        else "Wall time."
    )
    return f"{clock} Rank 0.\n\n" + _table(("part of a step", "ms", "share", ""), "lrrl", rows)


def _between(profiled: Profiled) -> str:
    seconds = profiled.ranks[0].seconds
    came = [f"{name} {seconds[name]:.2f} s" for name in BESIDE if name in seconds]
    return f"Between these steps, and in the operators below: {', '.join(came)}." if came else ""


def _ranks(profiled: Profiled) -> str:
    """What others waited: the ranks beside each other."""
    if len(profiled.ranks) == 1:
        return ""
    steps = len(profiled.rows)
    rows = [
        (
            str(number),
            *(_ms(rank.seconds.get(name, 0.0) / steps) for name in PARTS),
            f"{rank.peak_memory_mib:,.0f}",
        )
        for number, rank in enumerate(profiled.ranks)
    ]
    titles = ("rank", *(title for title, _ in PARTS.values()), "peak MiB")
    return (
        "The ranks, in ms a step. Whoever waits long in the collective waits for those who compute longer.\n\n"
        + _table(titles, "r" * len(titles), rows)
    )


def _operators(profiled: Profiled) -> str:
    operators = profiled.operators
    if not operators.largest_first:
        return ""
    steps, whole = len(profiled.rows), sum(profiled.ranks[0].seconds.values())
    rows = [
        (f"`{o.name}`", f"{o.calls / steps:,.1f}", _ms(o.seconds / steps), _share(o.seconds, whole))
        for o in operators.largest_first[:MOST_OPERATORS]
    ]
    if operators.kernel_s is not None:
        said = f"The GPU was busy for {_share(operators.kernel_s, whole)} of the time, its streams added up."
    else:
        said = (
            "Without those that they call. `forward itself` and its like are what a phase spends in no operator: "
            "Python, and waiting."
        )
    return f"Operators of rank 0, the largest first. {said}\n\n" + _table(
        ("operator", "calls a step", "ms a step", "share"), "lrrr", rows
    )


def _mean(rows: Sequence[Mapping[str, Any]], rate: str) -> float:
    """Of a rate over time."""
    return sum(row[rate] * row["step_time_s"] for row in rows) / sum(row["step_time_s"] for row in rows)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{1 if seconds < 0.1 else 0}f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _table(titles: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> str:
    """Markdown; `sides` says of each column whether it stands to the left (l) or right (r)."""
    lines = [titles, [{"l": ":--", "r": "--:"}[side] for side in sides], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
