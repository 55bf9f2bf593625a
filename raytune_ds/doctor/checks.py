"""What one node has. Each check is small, and none needs Ray."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from raytune_ds import network, storage
from raytune_ds.doctor.finding import Finding, Status
from raytune_ds.doctor.versions import MISSING, versions
from raytune_ds.errors import first_line

GIB = 1 << 30
SHM = Path("/dev/shm")
LEAST_SHM_GIB = 2.0  # less, and Ray's object store and NCCL move to slower ways
LEAST_DISK_GIB = 10.0  # a model of the hub, DeepSpeed's builds, what Ray spills
LEAST_OPEN_FILES = 8192  # Ray asks for as many
TIMEOUT_S = 20.0
BUILT_IN = "not needed: DeepSpeed's op is built in"
Command = Callable[[list[str]], str]
"""Runs a command and returns what it says; FileNotFoundError, or OSError with what went wrong."""


def examine(address: str | None, root: str) -> list[Finding]:
    """All that can be found on this node alone.

    Args:
        address: by which other nodes reach this one; None: nobody else looks at the storage either.
        root: `run.storage`, absolute.
    """
    gpus = check_gpus()
    findings = [*check_versions(), *check_low_bits(), gpus]
    if gpus.status != "absent":
        findings += [check_torch_cuda(), check_cuda_toolkit(os.environ)]
    findings += [
        check_interface(address, os.environ),
        check_shm(),
        *check_disks(root),
        check_open_files(),
        check_compiler(),
        check_hub_token(),
    ]
    if address is None:
        findings.append(check_storage(root))
    return findings


def check_versions() -> Iterator[Finding]:
    """Whether all packages are there; whether they agree is found elsewhere."""
    for name, version in versions().items():
        if version == MISSING:
            yield Finding(
                name, "bad", version, "install raytune_ds with its dependencies (requirements.lock)"
            )
        else:
            yield Finding(name, "ok", version)


def check_low_bits() -> Iterator[Finding]:
    """What holds weights and moments in few bits, where it is installed."""
    for package, extra, gives in (
        ("bitsandbytes", "quantization", "model.quantization=nf4 or int8, and AdamW in 8 bits"),
        ("torchao", "torchao", "model.quantization=int4 or fp8"),
    ):
        if importlib.util.find_spec(package) is None:
            yield Finding(package, "absent", "none", f"pip install 'raytune_ds[{extra}]' gives {gives}")
        else:
            yield Finding(package, "ok", metadata.version(package))


def run_command(command: list[str]) -> str:
    """What a command says on its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise OSError((done.stderr or done.stdout).strip() or f"exit code {done.returncode}")
    return done.stdout


def check_gpus(run: Command = run_command) -> Finding:
    """GPUs and driver, as nvidia-smi has them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = [line.split(", ") for line in run(query).strip().splitlines()]
    except FileNotFoundError:
        if Path("/dev/nvidiactl").exists():
            return Finding(
                "GPUs", "bad", "a device, but no nvidia-smi", "start the container with the nvidia runtime"
            )
        return Finding("GPUs", "absent", "none")
    except (OSError, subprocess.TimeoutExpired) as error:
        advice = "reload the driver or reboot the node; in a container, see that its nvidia runtime is on"
        return Finding("GPUs", "bad", f"nvidia-smi fails: {first_line(error)}", advice)
    kinds = {(name, memory) for name, memory, _ in lines}
    shown = ", ".join(f"{name} {int(memory) / 1024:.0f} GiB" for name, memory in sorted(kinds))
    return Finding("GPUs", "ok", f"{len(lines)} x {shown}, driver {lines[0][2]}")


def check_torch_cuda() -> Finding:
    """Whether torch can use the GPUs. Imports torch."""
    try:
        import torch
    except ImportError as error:
        return Finding(
            "torch.cuda",
            "bad",
            first_line(error),
            "install raytune_ds with its dependencies (requirements.lock)",
        )
    built = torch.version.cuda
    if built is None:
        return Finding(
            "torch.cuda", "bad", f"torch {torch.__version__} is built without CUDA", "install a CUDA build"
        )
    if not torch.cuda.is_available():
        advice = "update the driver, or install a torch built for an older CUDA; see that the GPUs are visible here"
        return Finding("torch.cuda", "bad", f"CUDA {built}, but no GPU can be used", advice)
    return Finding("torch.cuda", "ok", f"CUDA {built}, {torch.cuda.device_count()} GPUs")


def check_cuda_toolkit(environment: Mapping[str, str]) -> Finding:
    """nvcc, which DeepSpeed's ops on GPU nodes are compiled by."""
    if op_is_built_in():
        return Finding("CUDA toolkit", "ok", BUILT_IN)
    home = environment.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        return Finding(
            "CUDA toolkit",
            "warn",
            "no nvcc",
            "install it, or set CUDA_HOME; engine.offload=optimizer needs it",
        )
    return Finding("CUDA toolkit", "ok", nvcc)


def check_compiler() -> Finding:
    """C++ and ninja, which DeepSpeed's ops are compiled by when they are first used."""
    if op_is_built_in():
        return Finding("compiler", "ok", BUILT_IN)
    compiler = os.environ.get("CXX") or "c++"
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if missing:
        advice = "install g++ and ninja-build, or use an image with the ops built in; engine.offload=optimizer needs it"
        return Finding("compiler", "warn", f"no {' and no '.join(missing)}", advice)
    return Finding("compiler", "ok", f"{shutil.which(compiler)}, ninja")


def op_is_built_in() -> bool:
    """Whether DeepSpeed came with its CPU optimizer compiled, as in our images. Imports nothing."""
    found = importlib.util.find_spec("deepspeed")
    places = found.submodule_search_locations if found else None
    return any([*Path(place).glob("ops/adam/cpu_adam_op*.so")] for place in places or ())


def check_interface(address: str | None, environment: Mapping[str, str]) -> Finding:
    """What gloo and NCCL will use between nodes."""
    address = address or network.own_address()
    if (problem := network.problem(environment)) is not None:
        return Finding("interface", "bad", problem, "unset it on this node, and it is found by itself")
    if wanted := environment.get(network.GLOO):
        return Finding("interface", "ok", f"{wanted}, set by {network.GLOO}")
    name = network.interface_of(address)
    if name is None:
        advice = (
            f"set {network.GLOO} and {network.NCCL} before `ray start`, or start Ray with --node-ip-address"
        )
        return Finding("interface", "warn", f"none carries this node's address {address}", advice)
    return Finding("interface", "ok", f"{name} ({address})")


def check_shm(path: Path = SHM) -> Finding:
    """The size of shared memory, which containers keep at 64 MiB unless asked."""
    if not path.is_dir():
        return Finding("shared memory", "absent", "no /dev/shm")
    size = shutil.disk_usage(path).total / GIB
    if size < LEAST_SHM_GIB:
        advice = f"give the container more: --shm-size={LEAST_SHM_GIB:.0f}g, or an emptyDir of medium Memory"
        return Finding("shared memory", "bad" if size < 0.1 else "warn", f"{size:.2f} GiB", advice)
    return Finding("shared memory", "ok", f"{size:.1f} GiB")


def check_disks(root: str) -> Iterator[Finding]:
    """Room where Ray spills, where models of the hub are kept, and in a storage that is a directory."""
    places = {"disk of /tmp": tempfile.gettempdir(), "disk of ~": str(Path.home())}
    if storage.is_local(root):
        places["disk of run.storage"] = root
    for name, place in places.items():
        yield check_disk(name, Path(place))


def check_disk(name: str, place: Path) -> Finding:
    """Free bytes where `place` is or will be."""
    there = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
    usage = shutil.disk_usage(there)
    found = f"{usage.free / GIB:,.0f} GiB free of {usage.total / GIB:,.0f}"
    if usage.free < LEAST_DISK_GIB * GIB:
        status: Status = "bad" if usage.free < GIB else "warn"
        return Finding(
            name, status, found, f"make room: {LEAST_DISK_GIB:.0f} GiB are little for a model of the hub"
        )
    return Finding(name, "ok", found)


def check_open_files() -> Finding:
    """The limit of open files, of which Ray and data loading take thousands; Ray raises the soft one by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
        return Finding(
            "open files", "warn", f"{hard:,} at most", "raise it: ulimit -n 65536, or --ulimit nofile=65536"
        )
    return Finding("open files", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,} at most")


def check_hub_token() -> Finding:
    """Whether there is a token of the Hugging Face Hub; never what it is."""
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", "ok", "present")
    return Finding(
        "hub token",
        "absent",
        "none",
        "gated and private models need HF_TOKEN in the environment of each node",
    )


def check_storage(root: str) -> Finding:
    """Whether `run.storage` can be written from here."""
    try:
        storage.check_writable(root)
    except (OSError, ValueError) as error:
        return Finding(
            "run.storage",
            "bad",
            f"{root}: {first_line(error)}",
            "set run.storage to a place that can be written",
        )
    return Finding("run.storage", "ok", f"{root}: writable")
