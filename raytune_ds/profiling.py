"""The profile of a few steps, `train.profile`: a trace of each rank, and a page that says where the time went.

Nothing of it may stop a run: what goes wrong in a profiler is a warning, and the ranks meet all the same.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from raytune_ds import phases, storage
from raytune_ds.errors import first_line
from raytune_ds.profilepage import (
    BESIDE,
    CPU,
    OTHER,
    Operator,
    Operators,
    Profiled,
    RankTimes,
    largest,
    page,
    span,
)
from raytune_ds.rundir import RunDir
from raytune_ds.world import World

T = TypeVar("T")

STEPS_BEFORE = 20
"""Steps before the first profiled one that say how long one takes without a profile."""


class Profile:
    """`train.profile` on one rank. What it does on one of them it does on all, at the same step."""

    def __init__(
        self,
        window: tuple[int, int] | None,
        run: RunDir,
        world: World,
        peak_memory_mib: Callable[[], float],
        note: Callable[[str], None],
        warn: Callable[[str], None],
        resting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Nothing is profiled yet.

        Args:
            window: the first and the last step; None: nothing is.
            run: where files go.
            world: the ranks.
            peak_memory_mib: the most memory of this rank so far.
            note: takes a line that says where to look; what others than rank 0 say is not seen.
            warn: takes what went wrong.
            resting: is entered while files are written, which may take a while.
        """
        self._window, self._run, self._world = window, run, world
        self._peak_memory_mib, self._note, self._warn, self._resting = peak_memory_mib, note, warn, resting
        self._problem: str | None = None
        self._timeline: Timeline | None = None
        self._profiler: profile | None = None
        self._before: deque[Mapping[str, Any]] = deque(maxlen=STEPS_BEFORE)
        self._rows: list[Mapping[str, Any]] = []
        self._has_begun = False

    def begins(self, step: int) -> None:
        """A step is about to begin. A collective after the last step of the window."""
        if self._window is None:
            return
        first, last = self._window
        if self._timeline is None:
            if first <= step <= last:
                self._open()
        elif step > last:
            self.end()

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if self._window is None or "step_time_s" not in row:
            return
        if self._timeline is not None:
            self._rows.append(row)
        elif self._has_begun:  # the first step of a worker waits for much that no other waits for
            self._before.append(row)
        self._has_begun = True

    def end(self) -> None:
        """Writes what there is; nothing where nothing is being profiled. A collective."""
        if self._timeline is None:
            return
        timeline, self._timeline = self._timeline, None
        self._window = None  # what is trained on again, after going back, is not profiled again
        phases.tell(None)
        timeline.end()
        with self._resting():
            seconds = self._excused(timeline.seconds) or {}
            memory = self._peak_memory_mib()
            operators = self._excused(self._stop) or Operators()
            self._excused(self._write_trace)
            ranks = self._world.gather(RankTimes(seconds, memory, self._problem))
            if self._world.is_main:
                self._problem = None
                self._excused(lambda: self._write(ranks, operators))
                for rank, problem in enumerate([times.problem for times in ranks]):
                    if problem is not None:
                        self._warn(f"train.profile: rank {rank}: {problem}")
                if self._problem is not None:
                    self._warn(f"train.profile: no summary: {self._problem}")

    def _open(self) -> None:
        timeline = self._timeline = Timeline(self._world.device)
        self._excused(self._start)

        @contextmanager
        def hear(name: phases.Phase) -> Iterator[None]:
            with record_function(name), timeline.phase(name):
                yield

        phases.tell(hear)
        timeline.begin()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)
        profiler.start()
        self._profiler = profiler

    def _stop(self) -> Operators:
        """On rank 0 what operators took."""
        if self._profiler is None:
            return Operators()
        self._profiler.stop()
        if not self._world.is_main:
            return Operators()
        return counted(self._profiler.key_averages(), self._world.device.type == "cuda")

    def _write_trace(self) -> None:
        if self._profiler is None:
            return
        with tempfile.TemporaryDirectory(prefix="raytune-profile-") as folder:
            file = Path(folder) / "trace.json.gz"
            self._profiler.export_chrome_trace(str(file))
            storage.copy(str(file), f"{self._run.profile}/{trace_name(*self._steps, self._world.rank)}")

    @property
    def _steps(self) -> tuple[int, int]:
        """The first and the last that were profiled."""
        steps = [row["step"] for row in self._rows] or [0]
        return min(steps), max(steps)

    def _write(self, ranks: list[RankTimes], operators: Operators) -> None:
        device = self._world.device
        profiled = Profiled(
            run=self._run.name,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else CPU,
            rows=self._rows,
            before=list(self._before),
            ranks=ranks,
            operators=operators,
        )
        path = f"{self._run.profile}/summary.md"
        storage.write_bytes(path, page(profiled).encode())
        self._note(f"profile of {span(*self._steps)}: {largest(profiled)}; {path} has the rest")

    def _excused(self, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # whatever a profiler or a storage raises, training goes on
            self._problem = self._problem or f"{type(error).__name__}: {first_line(error)}"
            return None


def trace_name(first: int, last: int, rank: int) -> str:
    """Of the trace of a rank."""
    return f"steps-{first:08d}-{last:08d}-rank-{rank}.json.gz"


def counted(events: Iterable[Any], on_gpu: bool) -> Operators:
    """What operators took: of the GPU's time where there is one, otherwise the CPU's.

    On a CPU the time that a phase spends outside of operators is an operator as well, named after the phase.

    Args:
        events: torch's, of each name one: operators, and on a GPU the kernels that they start.
        on_gpu: whether there is one.
    """
    labels = get_args(phases.Phase)
    found, kernel_s = [], 0.0
    for event in events:
        if event.device_type.name != "CPU":
            # A phase is there once more, as long as the GPU is at it.
            kernel_s += 0.0 if event.is_user_annotation else event.self_device_time_total / 1e6
        elif not (on_gpu and event.key in labels):
            micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            name = f"{event.key} itself" if event.key in labels else event.key
            found.append(Operator(name, event.count, micros / 1e6))
    return Operators(tuple(sorted(found, key=lambda one: -one.seconds)), kernel_s if on_gpu else None)


class Timeline:
    """When phases begin and end, by the clock of the device.

    On a GPU that is an event in the stream that the phase works on: a phase lasts as long as the GPU is at it, or waits
    for what it is given next. Nobody waits for the GPU meanwhile, so the steps go on as they do without a profile.
    """

    def __init__(self, device: torch.device) -> None:
        """Of nothing yet."""
        self._device = device
        self._marks: list[tuple[str | None, Any]] = []

    def begin(self) -> None:
        """From here on all time is told."""
        self._mark(OTHER)

    def end(self) -> None:
        """Until here."""
        self._mark(None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is within is that phase."""
        self._mark(name)
        try:
            yield
        finally:
            self._mark(None)

    def _mark(self, begins: str | None) -> None:
        """Something begins, or the last thing that began ends."""
        if self._device.type != "cuda":
            self._marks.append((begins, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((begins, event))

    def seconds(self) -> dict[str, float]:
        """The time of each phase without those in it; an evaluation or a checkpoint with them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spent: dict[str, float] = defaultdict(float)
        within: list[str] = []
        for (begins, at), (_, next_at) in zip(self._marks, self._marks[1:], strict=False):
            if begins is None:
                within.pop()
            else:
                within.append(begins)
            name = next((name for name in within if name in BESIDE), within[-1])
            spent[name] += at.elapsed_time(next_at) / 1e3 if self._device.type == "cuda" else next_at - at
        return dict(spent)
