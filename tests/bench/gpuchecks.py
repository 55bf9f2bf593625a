"""Before anything is timed: each kernel gives what the plain way gives, and how often the host waits for the device."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from raytune_ds.model import kernels
from raytune_ds.model.attention import segment_sdpa, varlen_kernel
from tests.bench.gpureport import Report
from tests.bench.gpushapes import Documents, shape
from tests.bench.gpusides import Case, Side, ours

HEADING = "Checks"
# Of losses of about ten nats. A kernel that sees another document, or loses a factor, is off by more.
LOSS_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
ATTENTION_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def check(report: Report, case: Case) -> None:
    """Rows of all checks; `case` says where and in what."""
    for sizes in ((12, 2, 128, 128), (16, 16, 192, 128)):
        name = "varlen and segment attention, {} heads, {} of keys, sizes {}/{}".format(*sizes)
        report.attempt(HEADING, name, 10, partial(_attention, report, case, name, *sizes))
    dense, moe = (_small(case, name) for name in ("qwen2-1.5b", "v2-lite"))
    plain = {"attention": "sdpa", "liger": False}
    pairs: list[tuple[str, Case, dict[str, Any]]] = [
        ("varlen attention, whole model", dense, {"attention": "varlen"}),
        ("the same with MLA", moe, {"attention": "varlen"}),
        ("grouped experts and the loop", moe, {"experts_implementation": "eager"}),
        ("activations recomputed", dense, {"recompute": True}),
        ("compiled layers", dense, {"compiled": True}),
        ("compiled layers, activations recomputed", dense, {"compiled": True, "recompute": True}),
    ]
    # Last, for it changes transformers' functions on this device.
    pairs += [("liger", dense, {"liger": True}), ("liger with MLA", moe, {"liger": True})]
    for name, small, switches in pairs:
        if "liger" in switches and not (kernels.liger_is_installed() and case.device.type == "cuda"):
            report.add(HEADING, {"": name, "note": "not run: it needs a GPU and liger-kernel"})
            continue
        work = partial(_same_losses, report, name, small, plain, {**plain, **switches})
        report.attempt(HEADING, name, 45, work)


def _small(case: Case, name: str) -> Case:
    small = shape(name, toy=True)
    drawn = Documents.drawn([20, 60, 200], 24, small["vocab_size"])
    return dataclasses.replace(case, shape=small, documents=drawn)


def _attention(report: Report, case: Case, name: str, heads: int, groups: int, size: int, value: int) -> None:
    if case.device.type != "cuda":
        report.add(HEADING, {"": name, "note": "not run: it needs a GPU"})
        return
    torch.manual_seed(0)
    lengths = [7, 130, 1, 400, 62]
    segments = torch.tensor(
        [0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=case.device
    )
    sizes = ((heads, size), (groups, size), (groups, value))
    inputs = [torch.randn(1, h, sum(lengths), d, device=case.device, dtype=case.dtype) for h, d in sizes]
    weights = torch.randn(1, heads, sum(lengths), value, device=case.device, dtype=case.dtype)
    found = []
    for kernel in (varlen_kernel, segment_sdpa):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        wide = torch.nn.functional.pad(v, (0, size - value))  # as packed_attention does
        out = kernel(q, k, wide, segments, max(lengths), None)[..., :value]
        out.backward(weights)
        found.append([out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)])
    differs = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    _verdict(report, name, differs, ATTENTION_TOLERANCE[case.dtype])


def _same_losses(report: Report, name: str, case: Case, plain: dict[str, Any], other: dict[str, Any]) -> None:
    """Both ways make three steps, so gradients are compared, too."""
    losses = []
    for switches in (plain, other):
        side = ours(case, pack=1024, packs=2, **switches)
        losses.append([side.step() for _ in range(3)])
    differs = max(abs(a - b) for a, b in zip(*losses, strict=True))
    _verdict(report, name, differs, LOSS_TOLERANCE[case.dtype], loss=losses[1][-1])


def _verdict(report: Report, name: str, differs: float, tolerance: float, **more: float) -> None:
    note = "ok" if differs <= tolerance else "DIFFERS"
    report.add(HEADING, {"": name, "differs": differs, "tolerance": tolerance, "note": note, **more})


def count_waits(report: Report, name: str, side: Side, device: torch.device) -> None:
    """How often the host waits for the device in one micro-batch's way forward and back, once warm."""
    batch = side.micro_batches[0]
    if device.type != "cuda":
        report.add(HEADING, {"": name, "note": "not run: it needs a GPU"})
        return

    def forward_and_back() -> None:
        assert side.losses_of is not None
        losses_N = side.losses_of(batch.to(device))
        (losses_N.sum() / 1000).backward()

    forward_and_back()
    with _waits() as found:
        forward_and_back()
    places = sorted(set(found()))
    report.add(HEADING, {"": name, "waits": len(found()), "note": "; ".join(places[:4]) or "ok"})


@contextmanager
def _waits() -> Iterator[Callable[[], list[str]]]:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: [
                f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}"
                for w in caught
                if "synchroniz" in str(w.message)
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
