"""A rank's batches, read ahead by Ray Data while the rank computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray.data

from raytune_ds.data.batch import Batch, cut, read
from raytune_ds.data.share import Share, fetch_rows, packs_of_row
from raytune_ds.data.store import Store

# Consecutive steps of a slot lie in one row group, so a task that fetches as many steps reads each group once or twice.
STEPS_PER_TASK = 32
# Fewer, longer tasks for long runs: Ray Data plans every one of them at the start.
MOST_TASKS = 2000
PREFETCHED_STEPS = 4
# Ray Data's first batch comes a second or two after it was asked for; short steps would wait for it.
OWN_STEPS = 3


def quiet() -> None:
    """Switches off the bars and messages of Ray Data: a run has its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def stream(
    store: Store, split: str, share: Share, steps: range, runtime_env: dict[str, Any] | None = None
) -> Iterator[list[Batch]]:
    """The micro-batches of each step, fetched ahead by Ray Data tasks.

    The tasks ask for no CPU: they mostly wait for storage, and a cluster whose CPUs all belong to the training workers
    would otherwise never run them. One at a time, or Ray would start any number of processes for them. Before the first
    of them is done, steps are read right here.

    Args:
        store: prepared.
        split: of it.
        share: of this rank.
        steps: to fetch, in order.
        runtime_env: of the tasks, where it is not that of their caller.
    """
    if len(steps) <= OWN_STEPS:
        yield from read(store, split, share, steps)
        return
    ahead = _ahead(store, split, share, steps[OWN_STEPS:], runtime_env)
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, ahead)
    pool.shutdown(wait=False)  # whoever wants no more before that does not wait for it
    yield from read(store, split, share, steps[:OWN_STEPS])
    yield first.result()
    yield from ahead


def _ahead(
    store: Store, split: str, share: Share, steps: range, runtime_env: dict[str, Any] | None
) -> Iterator[list[Batch]]:
    per_task = max(STEPS_PER_TASK, -(-len(steps) // MOST_TASKS))
    tasks = [
        {"first": first, "last": min(first + per_task, steps.stop)}
        for first in range(steps.start, steps.stop, per_task)
    ]
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    quiet()
    # from_items and not range: that one's own read tasks ask for a CPU.
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        fetch_rows,
        fn_kwargs={"store": store, "split": split, "share": share},
        batch_size=None,
        num_cpus=0,
        concurrency=1,
        runtime_env=runtime_env or {},
    )
    for table in dataset.iter_batches(
        batch_size=1, batch_format="pyarrow", prefetch_batches=PREFETCHED_STEPS
    ):
        yield cut(share, packs_of_row(table))
