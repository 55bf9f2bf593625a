"""Work for all CPUs of the cluster, of which no more waits than they begin next.

Ray Data begins a task a fifth of a second after the one before it has ended, and what reads faster than others work
fills the object store. So these are tasks of Ray itself, a few for each CPU at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

import ray

T = TypeVar("T")

_AHEAD = 4
"""Tasks for each CPU: the one that runs, and the next ones."""
_YIELDED_AHEAD = 2
_STOP_S = 10.0


def num_cpus() -> int:
    """Of the cluster as it is now; at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def stream(
    work: Callable[..., Iterator[Any]], shares: Iterable[Any], cpus: float, at_once: int, **told: Any
) -> Generator[Any, None, None]:
    """References to all that `work` yields of each of `shares`, one of each in turn, little before they are asked for.

    Args:
        work: a generator, which a task runs.
        shares: what it gets, each in a task of its own.
        cpus: that a task takes.
        at_once: tasks at the same time.
        told: to all of them.
    """
    task = _remote(work, cpus, num_returns="streaming", _generator_backpressure_num_objects=_YIELDED_AHEAD)
    begun = _begun(task, shares, told)
    running = deque(islice(begun, at_once))
    try:
        while running:
            try:
                yield next(running[0])
                running.rotate(-1)
            except StopIteration:
                running.popleft()
                running.extend(islice(begun, 1))
    finally:
        for generator in running:
            ray.cancel(generator, force=True)


def each(work: Callable[..., T], items: Iterable[Any], cpus: float, **told: Any) -> Generator[T, None, None]:
    """What `work` makes of each of `items`, or of what they refer to, as it is made. The first tasks begin at once.

    Args:
        work: which a task runs.
        items: what it gets, each in a task of its own.
        cpus: that a task takes.
        told: to all of them.
    """
    waiting = iter(items)
    # Of little data these are all, and whatever they come from has left its process to the first of them.
    first = list(islice(waiting, _AHEAD * num_cpus()))
    begun = _begun(_remote(work, cpus), chain(first, waiting), told)
    return _results(list(islice(begun, len(first))), begun)


def _results(running: list[Any], begun: Iterator[Any]) -> Generator[Any, None, None]:
    try:
        while running:
            done, running = ray.wait(running)
            yield ray.get(done[0])
            # There may be more nodes by now. And not before that: Ray crashes where a task that it has just been given
            # is taken back.
            running += islice(begun, max(0, _AHEAD * num_cpus() - len(running)))
    finally:
        for one in running:
            ray.cancel(one, force=True)
        if running:
            ray.wait(running, num_returns=len(running), timeout=_STOP_S)


def _begun(task: Any, items: Iterable[Any], told: dict[str, Any]) -> Iterator[Any]:
    """The task of each of `items`, begun when it is asked for."""
    shared = {name: ray.put(value) for name, value in told.items()}
    return (task.remote(item, **shared) for item in items)


def _remote(work: Callable[..., Any], cpus: float, **options: Any) -> Any:
    # The strategy also keeps tasks out of a placement group that whoever asks for them may be in.
    return ray.remote(work).options(num_cpus=cpus, scheduling_strategy="SPREAD", **options)
