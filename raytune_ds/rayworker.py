"""A worker inside Ray Train: what it hears from Ray and the driver, and how it tells them what happens."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raytune_ds import stacks
from raytune_ds.assignment import Assignment
from raytune_ds.data.stream import stream
from raytune_ds.ending import Outcome
from raytune_ds.hooks import Orders
from raytune_ds.stacks import Place
from raytune_ds.startup import HOOK
from raytune_ds.watch import Pulse
from raytune_ds.worker import run_worker
from raytune_ds.world import World

BEAT_S = 5.0
NEAR_S = 20.0
"""Before the end of a node's notice: long enough for a few looks and a checkpoint."""


def worker_main(assignment: Assignment, mailbox: Any, is_judged: bool) -> Outcome:
    """What Ray Train runs in each worker."""
    context = ray.train.get_context()
    _use_threads()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL gathers objects
    scaling = assignment.config.scaling
    world = World(
        context.get_world_rank(), context.get_world_size(), device, timeout_s=scaling.collective_timeout_s
    )
    if world.is_main:
        mailbox.put.remote("arrived", {"world_size": world.size})

    def report(kind: str, content: dict[str, Any]) -> None:
        if world.is_main:
            mailbox.put.remote(kind, content)
        if kind == "eval":
            ray.train.report({k: v for k, v in content.items() if isinstance(v, int | float)})

    def judge(step: int) -> bool:
        return bool(ray.get(mailbox.verdict.remote(step)))

    stopped = mailbox.stopped.remote() if world.is_main else None
    known: set[str] = set()

    def stop_asked() -> bool:
        if stopped is None or not ray.wait([stopped], timeout=0)[0]:
            return False
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(stopped)
            return True
        return False  # the driver is gone

    def is_leaving() -> bool:
        info = ray.train.get_preemption_info()
        if info is None:
            return False
        nodes = set(info.preempted_node_ids) - known
        known.update(nodes)
        return bool(nodes) or _is_near(info.deadline_ms)

    pulse = Pulse(world.rank)
    orders = Orders(judge if is_judged else None, stop_asked, is_leaving, pulse)
    node = ray.get_runtime_context().get_node_id()
    limits = [limit for limit in (scaling.hang_timeout_s, scaling.collective_timeout_s) if limit]
    with (
        stacks.on_demand(node) as place,
        _beating(pulse, place, mailbox, min([BEAT_S, *(limit / 4 for limit in limits)])),
    ):
        outcome = run_worker(assignment, world, _open_stream, report, orders)
    # Only one that ends well leaves: whoever fails is still what the others waited for.
    mailbox.leaves.remote(world.rank)
    return outcome


def _use_threads() -> None:
    """As many as Ray wants of a worker. It says so once it knows the worker, and torch was imported before."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _is_near(deadline_ms: int | None) -> bool:
    """Whether the time is almost up, so that what was trained since the notice is worth a checkpoint too."""
    return bool(deadline_ms and deadline_ms / 1000 - time.time() < NEAR_S)


@contextlib.contextmanager
def _beating(pulse: Pulse, place: Place, mailbox: Any, every_s: float) -> Iterator[None]:
    """Signs of life go out from a thread of their own, so that they tell a busy worker from a dead one."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(every_s):
            mailbox.beat.remote(pulse.beat(), place)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _open_stream(store: Any, share: Any, steps: range) -> Any:
    # Its tasks would begin with what a worker imports.
    hooked = os.environ.get(HOOK, "").startswith("raytune_ds.")
    return stream(store, "train", share, steps, {"env_vars": {HOOK: ""}} if hooked else None)
