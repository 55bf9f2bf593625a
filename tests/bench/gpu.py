"""Builds, checks and times training on a GPU: one command, within ten minutes, without network, Ray or DeepSpeed.

    python -m tests.bench.gpu --out DIR            # real shapes, random weights
    python -m tests.bench.gpu --out DIR --toy      # the same at toy size, on a CPU

What matters most comes first, and each row is written as soon as it is there. Sides alternate, medians count, and all
of them make the same update of the same weights on the same rows, which their last losses show. Peak memory is what a
side takes over what was there before it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytune_ds.errors import first_line
from raytune_ds.model import kernels
from raytune_ds.model.flops import peak_flops
from tests.bench import gpuchecks
from tests.bench.gpureport import Deadline, Report
from tests.bench.gpushapes import LENGTHS, Documents, shape
from tests.bench.gpusides import Case, Side, ours, padded

MIB = 1 << 20
Make = Callable[[], Side]
Measured = tuple[str, float, float, float | None, float | None]
"""Name, median seconds, last loss, peak MiB, needed operations."""


@dataclass
class Bench:
    """What all sections share."""

    report: Report
    device: torch.device
    dtype: torch.dtype
    toy: bool
    folder: Path
    alternations: int

    def case(self, model: str, lengths: str, rows: int, lora: bool = True) -> Case:
        """`rows` documents of a key of LENGTHS for a model."""
        sizes = shape(model, self.toy)
        drawn = Documents.drawn(LENGTHS[lengths], 12 if self.toy else rows, sizes["vocab_size"], self.toy)
        return Case(sizes, drawn, self.device, self.dtype, lora, self.folder)

    def compare(self, heading: str, case: Case, makers: dict[str, Make], together: bool = True) -> None:
        """Times all sides and adds a row for each; ratios are to the first.

        Args:
            heading: of the table.
            case: what they compute.
            makers: of the sides, by name.
            together: all are there at once, and alternate; False: one after the other, where memory wants it.
        """
        groups = [makers] if together else [{name: make} for name, make in makers.items()]
        first: float | None = None
        for group in groups:
            for name, seconds, loss, peak, flops in self._measure(heading, group):
                first = first or seconds
                fastest = peak_flops(self.device)
                row: dict[str, Any] = {"": name, "tokens/s": case.documents.tokens / seconds}
                row |= {
                    "time, of the first's": seconds / first,
                    "peak MiB": peak if peak is not None else "-",
                }
                row |= {"MFU": flops / seconds / fastest if flops and fastest else "-", "last loss": loss}
                self.report.add(heading, row)
            self._clean()

    def _measure(self, heading: str, makers: dict[str, Make]) -> list[Measured]:
        sides: dict[str, Side] = {}
        peaks: dict[str, float | None] = {}
        seconds: dict[str, list[float]] = {}
        losses: dict[str, float] = {}

        def without_what_fails(name: str, work: Callable[[], None]) -> None:
            try:
                work()
            except (RuntimeError, ValueError, ImportError) as error:  # too large, or torch's kernel refuses
                sides.pop(name, None)
                text = f"failed: {type(error).__name__}: {first_line(error)[:160]}"
                self.report.add(heading, {"": name, "note": text})

        def begin(name: str) -> None:
            sides[name], peaks[name] = self._begin(makers[name])

        def step(name: str) -> None:
            started = time.perf_counter()
            losses[name] = sides[name].step()  # a number: the device is done
            seconds.setdefault(name, []).append(time.perf_counter() - started)

        for name in makers:
            without_what_fails(name, partial(begin, name))
            self._clean()
        for _ in range(self.alternations):
            for name in list(sides):
                without_what_fails(name, partial(step, name))
        return [
            (n, statistics.median(seconds[n]), losses[n], peaks[n], side.flops) for n, side in sides.items()
        ]

    def _begin(self, make: Make) -> tuple[Side, float | None]:
        """A side after its first two steps, which compile, tune and make optimizer states; its peak memory in MiB."""
        if self.device.type != "cuda":
            side = make()
            side.step()
            return side, None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side = make()
        side.step()
        torch.cuda.reset_peak_memory_stats()  # filling it with weights took more
        side.step()
        return side, (torch.cuda.max_memory_allocated() - before) / MIB

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def headline(
    bench: Bench,
    model: str,
    lengths: str,
    rows: int,
    lora: bool = True,
    packs: int = 4,
    together: bool = True,
) -> None:
    """Ours beside the tutorials' recipe at batches of 4 and 8."""
    case = bench.case(model, lengths, rows, lora)
    heading = f"{model}, {'LoRA' if lora else 'all parameters'}, {lengths} rows"
    makers: dict[str, Make] = {
        "raytune_ds": partial(ours, case, liger=False, packs=packs),
        "padded, 4": partial(padded, case, batch=4, recompute=True),
        "padded, 8": partial(padded, case, batch=8, recompute=True),
        "padded, 8, activations kept": partial(padded, case, batch=8, recompute=False),
    }
    bench.compare(heading, case, makers, together)
    if importlib.util.find_spec("trl") is None:
        bench.report.add(heading, {"": "TRL", "note": "not installed"})
    else:
        bench.report.add(heading, {"": "TRL", "note": "installed, but this script has no side of it"})


def utilisation(bench: Bench) -> None:
    """MFU of a dense model, all parameters, documents of 4,096 tokens."""
    sizes = shape("qwen2-1.5b", bench.toy)
    length, count = (64, 4) if bench.toy else (4096, 8)
    case = bench.case("qwen2-1.5b", "alpaca", 1, lora=False)
    case = replace(case, documents=Documents.long(length, count, sizes["vocab_size"]))
    make = partial(ours, case, pack=length, liger=False)
    makers: dict[str, Make] = {
        "2 packs at once": partial(make, packs=2),
        "4 packs at once": partial(make, packs=4),
        "2 packs, compiled": partial(make, packs=2, compiled=True),
    }
    bench.compare(
        f"MFU: qwen2-1.5b, all parameters, documents of {length} tokens", case, makers, together=False
    )


def switches(bench: Bench, model: str, together: bool = True) -> None:
    """One switch after the other, beside the defaults."""
    case = bench.case(model, "glaive", 64)
    make = partial(ours, case)
    makers: dict[str, Make] = {
        "defaults without liger": partial(make, liger=False),
        "model.attention=sdpa": partial(make, liger=False, attention="sdpa"),
        "train.torch_compile=true": partial(make, liger=False, compiled=True),
        "train.activation_checkpointing=full": partial(make, liger=False, recompute=True),
        "packs of 8,192": partial(make, liger=False, pack=1024 if bench.toy else 8192, packs=1),
    }
    if "n_routed_experts" in case.shape:
        makers["model.experts_implementation=eager"] = partial(
            make, liger=False, experts_implementation="eager"
        )
    if bench.device.type == "cuda" and kernels.liger_is_installed():
        # The last to be made: it changes transformers' functions on this device.
        makers["model.liger_kernel=true"] = partial(make, liger=True)
        makers["liger and compiled"] = partial(make, liger=True, compiled=True)
    heading = f"Switches: {model}, LoRA, glaive rows"
    bench.compare(heading, case, makers, together)
    if "model.liger_kernel=true" not in makers:
        bench.report.add(
            heading, {"": "model.liger_kernel=true", "note": "not run: it needs a GPU and liger-kernel"}
        )


def waits(bench: Bench) -> None:
    """Host synchronisations of a micro-batch."""
    case = bench.case("qwen2-1.5b", "glaive", 16)
    name = "waits of the host in a micro-batch, forward and back"
    gpuchecks.count_waits(bench.report, name, ours(case, liger=False), bench.device)


def about(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what."""
    packages = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "accelerate")
    found = {name: _version(name) for name in packages}
    gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / MIB if gpu else None
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "memory": f"{memory:,.0f} MiB" if memory else "-",
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **found,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Everything, most important first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for results.md and results.json")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU, in float32")
    parser.add_argument("--deadline", type=float, default=570, help="seconds that all may take; 570")
    asked = parser.parse_args()
    if asked.toy:
        torch.set_num_threads(1)  # more have nothing to share
        # Graphs are made, but no C++ of them, which would take longer than all the rest.
        nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign,assignment]
    device = torch.device("cpu" if asked.toy else "cuda")
    dtype = torch.float32 if asked.toy else torch.bfloat16
    report = Report(asked.out, about(device, dtype), Deadline(asked.deadline))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(report, device, dtype, asked.toy, Path(folder), 3 if asked.toy else 5)
        run(bench)


def run(bench: Bench) -> None:
    """All sections. The seconds are what each may be expected to take on a GPU of Hopper's kind, with room."""
    report, scale = bench.report, 0.1 if bench.toy else 1.0

    def section(heading: str, needed_s: float, work: Callable[[], None]) -> None:
        report.attempt(heading, "all", needed_s * scale, work)

    case = bench.case("qwen2-1.5b", "alpaca", 16)
    section("Checks", 30, partial(gpuchecks.check, report, case))
    section("Checks", 20, partial(waits, bench))
    section("qwen2-1.5b", 60, partial(headline, bench, "qwen2-1.5b", "alpaca", 128))
    section("qwen2-1.5b", 60, partial(headline, bench, "qwen2-1.5b", "glaive", 64))
    section("MFU", 40, partial(utilisation, bench))
    section("llama-8b", 80, partial(headline, bench, "llama-8b", "alpaca", 64, packs=2, together=False))
    section("Switches", 80, partial(switches, bench, "qwen2-1.5b"))
    section("v2-lite", 80, partial(headline, bench, "v2-lite", "alpaca", 64, packs=2, together=False))
    section(
        "qwen2-1.5b", 60, partial(headline, bench, "qwen2-1.5b", "alpaca", 64, lora=False, together=False)
    )
    section("Switches", 80, partial(switches, bench, "v2-lite", together=False))


if __name__ == "__main__":
    main()
