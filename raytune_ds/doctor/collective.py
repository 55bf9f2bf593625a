"""A real all-reduce between nodes, one process on each: whether they reach each other, and how fast."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from raytune_ds import network

MIB = 1 << 20
SIZE_MIB = {"gloo": 16, "nccl": 256}
ROUNDS = 4
CONNECT_S = 15.0
"""How long a node may take to appear; the collective itself gets as long again."""


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet: a port of the first one.

    Attributes:
        backend: gloo or nccl.
        address: of the first node.
        port: there.
        names: of all nodes, by rank.
    """

    backend: str
    address: str
    port: int
    names: tuple[str, ...]


def free_port() -> int:
    """A port that nobody listens on here."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def show_gpus() -> bool:
    """Whether torch sees a GPU in this process, also where Ray has hidden them from a process that asked for none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    import torch

    return bool(torch.cuda.is_available())


def all_reduce(rank: int, own_address: str, meeting: Meeting) -> float:
    """The bytes a second and direction that an all-reduce moves between this node and the others.

    Raises:
        ConnectionError: naming the node that did not come, or what the connection failed of.
    """
    network.use_interface_of(own_address, os.environ)
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # so torch documents it

    store = _meet(rank, meeting)
    timeout = timedelta(seconds=CONNECT_S)
    try:
        dist.init_process_group(
            meeting.backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=len(meeting.names),
            timeout=timeout,
        )
        return _measure(meeting)
    except RuntimeError as error:
        if waited_for := re.search(r"keys: \S*/(\d+)$", str(error).strip()):
            raise ConnectionError(f"{meeting.names[int(waited_for[1])]} did not join the group") from None
        raise ConnectionError(_told(error)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(rank: int, meeting: Meeting) -> Any:
    """The store that all nodes have signed."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # so torch documents it

    first, timeout = meeting.names[0], timedelta(seconds=CONNECT_S)
    place = f"{meeting.address}:{meeting.port} of {first}"
    try:
        store = TCPStore(
            meeting.address, meeting.port, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        raise ConnectionError(f"can't reach {place}: {_told(error)}") from None
    store.set(f"here/{rank}", "")
    keys = [f"here/{other}" for other in range(len(meeting.names))]
    end = time.monotonic() + CONNECT_S
    while not store.check(keys):
        if time.monotonic() > end:
            absent = [name for name, key in zip(meeting.names, keys, strict=True) if not store.check([key])]
            raise ConnectionError(f"{', '.join(absent)} did not come to {place} in {CONNECT_S:.0f} s")
        time.sleep(0.05)
    return store


def _measure(meeting: Meeting) -> float:
    import torch
    import torch.distributed as dist

    device = "cuda" if meeting.backend == "nccl" else "cpu"
    size = SIZE_MIB[meeting.backend] * MIB
    numbers = torch.ones(size // 4, device=device)
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(numbers)
        float(numbers[0])  # waits for a GPU
        times.append(time.perf_counter() - started)
    ranks = len(meeting.names)
    # Of a ring: every node sends all but one of the ranks' parts twice.
    return 2 * (ranks - 1) / ranks * size / min(times)


def _told(error: Exception) -> str:
    """The part of torch's message that says something, without its C++ places."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.rpartition("] ")[2] or text
