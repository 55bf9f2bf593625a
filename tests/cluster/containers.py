"""Images and containers without an engine: buildah builds, podman runs them in namespaces that end with the test."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = {
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "iptables": "iptables",
    "/usr/lib/podman/netavark": "netavark",
    "/usr/lib/podman/aardvark-dns": "aardvark-dns",
    "catatonit": "catatonit",
}
BASE = "localhost/base"
CERTIFICATE = "/run/host-certificates.crt"
NAMESPACES = ("--net", "--mount", "--pid")


def why_not() -> str | None:
    """What keeps this machine from building images and running containers; None if nothing does."""
    if os.geteuid() != 0:
        return "only root may build images without an engine"
    if lacking := sorted({package for tool, package in TOOLS.items() if not _is_there(tool)}):
        return f"missing: apt-get install --no-install-recommends {' '.join(lacking)}"
    try:
        run("unshare", *NAMESPACES, "--fork", "--mount-proc", "true")
    except RuntimeError as error:
        return f"kernel namespaces are not allowed: {error}"
    return None


def _is_there(tool: str) -> bool:
    return (
        shutil.which(tool, path=f"{os.environ['PATH']}:/usr/libexec/podman:/usr/libexec/catatonit")
        is not None
    )


def run(*command: str | Path, timeout: float = 600, **environment: str) -> str:
    """The standard output of a command.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if command[0] == "buildah" else subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        said = (done.stdout + (done.stderr or ""))[-4000:]
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{said}")
    return done.stdout


def until(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits for something.

    Raises:
        TimeoutError: in vain.
    """
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {seconds:.0f} s")
        time.sleep(0.5)


# ------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """Where images are kept: a folder that can be deleted as a whole."""

    folder: Path

    @property
    def _storage(self) -> tuple[str, ...]:
        return (
            "--storage-driver=overlay",
            f"--root={self.folder}/images",
            f"--runroot={self.folder}/run",
        )

    def buildah(self, *arguments: str | Path, timeout: float = 900) -> str:
        """Runs buildah, in a mount namespace of its own, so that no mount stays."""
        # The folder of its temporary files, too, goes with the test.
        return run(
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("buildah", *self._storage, *arguments),
            timeout=timeout,
            BUILDAH_ISOLATION="chroot",
            TMPDIR=str(self.folder),
        )

    def podman(self, *arguments: str) -> list[str]:
        """The words of a podman command."""
        return ["podman", *self._storage, f"--tmpdir={self.folder}/run/libpod", *arguments]

    def make_base(self) -> None:
        """The smallest Debian there is, of the suite and from the mirror that this machine itself has."""
        archive = self.folder / "base.tar"
        suite, mirror = _mirror()
        run("mmdebstrap", "--quiet", "--variant=minbase", suite, archive, mirror)
        container = self.buildah("from", "scratch").split()[-1]
        self.buildah("add", "--quiet", container, archive, "/")
        self.buildah(
            "config", "--env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container
        )
        self.buildah("commit", "--rm", "--quiet", container, BASE)
        archive.unlink()

    def build(self, target: str) -> str:
        """Builds a target of docker/Dockerfile; returns what buildah said."""
        return self.buildah(
            *("build", "--format=docker", "--layers", "--pull-never", "--file=docker/Dockerfile"),
            *(f"--target={target}", f"--tag=raytune-ds:{target}", f"--build-arg=BASE_IMAGE={BASE}"),
            "--build-arg=VERSION=1.2.3",
            *([f"--build-arg=PIP_ARGS={args}"] if (args := os.environ.get("PIP_ARGS")) else []),
            *(f"--volume={source}:{target}:ro" for source, target in _pip_settings(self.folder).items()),
            ".",
        )


def _mirror() -> tuple[str, str]:
    """Suite and mirror, from this machine's own sources."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    suite = release["VERSION_CODENAME"].strip('"')
    listed = run("apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages")
    return next((suite, line.split()[1]) for line in listed.splitlines() if line.split()[0] == suite)


def _pip_settings(folder: Path) -> dict[str, str]:
    """The pip settings of this machine and the folders they name: where each is mounted during a build."""
    mounts, lines = {}, ["[global]"]
    for line in run(shutil.which("python3") or "python3", "-m", "pip", "config", "list").splitlines():
        name, _, quoted = line.partition("=")
        key, value = name.rpartition(".")[2], str(ast.literal_eval(quoted))
        if key == "cert":
            mounts[value], value = CERTIFICATE, CERTIFICATE
        elif key == "constraint":
            continue  # the image has its own
        else:
            for word in value.split():
                # An index refers to files that lie beside it.
                place = (
                    Path(word.removeprefix("file://")).parent if word.startswith("file:///") else Path(word)
                )
                if place.is_absolute() and place.exists():
                    mounts[str(place)] = str(place)
        lines.append(f"{key} = {value}")
    settings = folder / "pip.conf"
    settings.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return mounts | {str(settings): "/etc/pip.conf"}


# --------------------------------------------------------------------------------------------- containers

# What podman leaves outside its own folders goes into file systems that end with the namespace.
PRELUDE = """
set -e
ip link set lo up
for folder in /run /dev/shm /var/lib/cni /etc/containers/networks /var/lib/containers; do
    mkdir -p $folder
    mount -t tmpfs tmpfs $folder
done
echo ready
exec sleep infinity
"""
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "netavark"
"""


class Sandbox:
    """Namespaces in which podman runs; everything in them ends with them."""

    def __init__(self, images: Images, pid: int, environment: dict[str, str]) -> None:
        self.images, self._pid, self._environment = images, pid, environment

    def run(self, *command: str | Path, timeout: float = 300, **environment: str) -> str:
        """See the function `run`; in here."""
        enter = ("nsenter", f"--target={self._pid}", *NAMESPACES, "--")
        return run(*enter, *command, timeout=timeout, **self._environment, **environment)

    def podman(self, *arguments: str, timeout: float = 300) -> str:
        """Runs podman in here."""
        return self.run(*self.images.podman(*arguments), timeout=timeout)


@contextlib.contextmanager
def sandbox(images: Images) -> Iterator[Sandbox]:
    """Namespaces, and what podman needs to work in them; nothing is left of them or of their containers."""
    import resource

    files, processes = (
        resource.getrlimit(which)[1] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
    )
    settings = images.folder / "containers.conf"
    settings.write_text(
        CONTAINERS_CONF.format(
            files=min(files, 20000) if files > 0 else 20000,
            processes=min(processes, 30000) if processes > 0 else 30000,
        )
    )
    shim = _podman_shim(images)
    command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", PRELUDE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        environment = {
            "CONTAINERS_CONF": str(settings),
            "TMPDIR": str(images.folder),
            "PATH": f"{shim}:{os.environ['PATH']}",
        }
        yield Sandbox(images, int(children[0]), environment)
    finally:
        process.kill()
        process.wait(30)
        _remove_control_groups()


def _podman_shim(images: Images) -> Path:
    """A folder with a `podman` that knows where the images are, for podman-compose."""
    folder = images.folder / "bin"
    folder.mkdir(exist_ok=True)
    words: Sequence[str] = images.podman()
    real = shutil.which("podman")
    (folder / "podman").write_text(f'#!/bin/sh\nexec {real} {" ".join(words[1:])} "$@"\n')
    (folder / "podman").chmod(0o755)
    return folder


def _remove_control_groups() -> None:
    """Those of podman are no part of any namespace; a group goes once its last process is gone."""

    def are_gone() -> bool:
        groups = [
            Path(folder) for folder, _, _ in os.walk("/sys/fs/cgroup", topdown=False) if "/libpod" in folder
        ]
        for group in groups:
            with contextlib.suppress(OSError):
                group.rmdir()
        return not any(group.exists() for group in groups)

    until(are_gone, 30, "podman's control groups removed")
