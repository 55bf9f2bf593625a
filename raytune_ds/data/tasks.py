"""Work for all CPUs of the cluster, of which no more waits than they begin next.

Ray Data begins a task a fifth of a second after the one before it has ended, and what reads faster than others work
fills the object store. So these are tasks of Ray itself, a few for each CPU at a time; and where one reader is enough,
who asks for the work is it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import ray

from raytune_ds.errors import UserError

T = TypeVar("T")

# Tasks for each CPU: the one that runs, and the next ones.
_AHEAD = 4
_YIELDED_AHEAD = 2
_WORKERS_A_READER = 8
# Less than a CPU and next to nothing, so that no number of readers, which wait for workers, leaves these no CPU.
_WORKER_CPUS, _READER_CPUS = 0.95, 0.01
# Ray 2.60 crashes where a task is cancelled in the moment in which it was begun.
_SETTLED_S = 0.5
_STOP_S = 10.0


def num_cpus() -> int:
    """Of the cluster as it is now; at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextlib.contextmanager
def each(work: Callable[..., T], items: Iterable[Any], **told: Any) -> Iterator[Iterator[T]]:
    """What `work` makes of each of `items`, as it is made, a task each; the first of them begin before it is asked for.

    Args:
        work: gets an item, and what all are told.
        items: what there is to do.
        told: to all tasks.

    Raises:
        UserError: of a task.
    """
    waiting = iter(items)
    with _Tasks(work, _WORKER_CPUS, told) as workers:

        def begin() -> None:
            for item in islice(waiting, workers.room()):
                workers.begin(item)

        def results() -> Iterator[T]:
            while workers.running:
                (done, *_), _ = ray.wait(workers.running)
                yield workers.result(done)
                begin()

        begin()
        yield results()


@contextlib.contextmanager
def each_read(
    read: Callable[..., Iterator[Any]],
    shares: Iterable[Any],
    told_readers: dict[str, Any],
    work: Callable[..., T],
    **told: Any,
) -> Iterator[Iterator[T]]:
    """What `work` makes of each thing that `read` yields of `shares`, as it is made, a task each.

    Where one reader is enough for the CPUs, it is the process that asks, as another one would take its memory too.

    Args:
        read: a generator, which gets a share, and what all readers are told; a task a share, few at a time.
        shares: what there is to read.
        told_readers: to all of them.
        work: gets what was yielded, and what all are told.
        told: to all tasks.

    Raises:
        UserError: of a task.
    """
    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": _YIELDED_AHEAD}
    with (
        _Tasks(read, _READER_CPUS, told_readers, **options) as readers,
        _Tasks(work, _WORKER_CPUS, told) as workers,
    ):
        yield _read_and_worked(partial(read, **told_readers), readers, iter(shares), workers)


def _read_and_worked(
    read: Callable[[Any], Iterator[Any]], readers: _Tasks, shares: Iterator[Any], workers: _Tasks
) -> Iterator[Any]:
    """The results of workers; `read` reads a share here."""
    here: Iterator[Any] | None = None
    while True:
        wanted = -(-num_cpus() // _WORKERS_A_READER)
        if wanted > 1:
            for share in islice(shares, max(0, wanted - len(readers.running))):
                readers.begin(share)
        elif here is None and not readers.running:
            here = next((read(share) for share in shares), None)
        if here is not None and workers.room() and not _begun(workers, here):
            here = None  # the next share
            continue
        has_room = workers.room() > 0
        waiting = [*workers.running, *(readers.running if has_room else ())]
        if not waiting:
            return
        # Where there is more to read here, what is ready is taken meanwhile.
        most, timeout_s = (len(waiting), 0) if here is not None and has_room else (1, None)
        ready, _ = ray.wait(waiting, num_returns=most, timeout=timeout_s, fetch_local=False)
        for one in ready:
            if isinstance(one, ray.ObjectRefGenerator):
                _begun(workers, readers.yielded(one))
            else:
                yield workers.result(one)


def _begun(workers: _Tasks, items: Iterator[Any]) -> bool:
    """Begins the next of the items, if there is one."""
    for item in islice(items, 1):
        workers.begin(item)
        return True
    return False


class _Tasks:
    """Tasks of one kind that run; those that still do when it is left are stopped."""

    def __init__(self, work: Callable[..., Any], cpus: float, told: dict[str, Any], **options: Any) -> None:
        self._task = ray.remote(work).options(
            num_cpus=cpus,
            # It also keeps them out of a placement group that whoever asks for them may be in.
            scheduling_strategy="SPREAD",
            max_retries=-1,  # nodes may come and go all day
            retry_exceptions=[ray.exceptions.RaySystemError],
            **options,
        )
        self._told = {name: ray.put(value) for name, value in told.items()}
        self._begun = 0.0
        self.running: list[Any] = []

    def __enter__(self) -> _Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.running:
            return
        time.sleep(max(0.0, self._begun + _SETTLED_S - time.monotonic()))
        for one in self.running:
            ray.cancel(one, force=True)
        ends = [one.completed() if isinstance(one, ray.ObjectRefGenerator) else one for one in self.running]
        ray.wait(ends, num_returns=len(ends), timeout=_STOP_S)

    def room(self) -> int:
        """How many more may be begun."""
        return max(0, _AHEAD * num_cpus() - len(self.running))

    def begin(self, item: Any) -> None:
        """Begins one."""
        self.running.append(self._task.remote(item, **self._told))
        self._begun = time.monotonic()

    def result(self, done: Any) -> Any:
        """What one made that has ended."""
        self.running.remove(done)
        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise

    def yielded(self, generator: Any) -> Iterator[Any]:
        """A reference to the next thing that one yields, if there is one; else it has ended."""
        self.running.remove(generator)
        for found in islice(generator, 1):
            self.running.append(generator)  # the others first
            yield found
