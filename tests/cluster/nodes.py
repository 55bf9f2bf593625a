"""Machines on this one: namespaces with an address, a home, a /tmp, a /dev/shm and an sshd each, on one bridge.

All of them live in one outer set of namespaces. When its first process dies, every process, mount and interface in it
is gone with it; and it dies with the process that made it. Nothing in there reaches anything outside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SHARED = "/srv"
"""Where every machine sees one and the same folder, as an NFS mount would be."""
READY_S = 20
TOOLS = {  # and the Debian package that has each
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "rsync": "rsync",
}

# Nothing but a bridge and the shared folder. $1: the folder of this world.
_WORLD = f"""
set -e
mount --bind "$1/shared" {SHARED}
ip link set lo up
ip link add bridge type bridge
ip link set bridge up
echo ready
while sleep 3600; do :; done
"""

# One machine. $1: the folder of the world; $2: its name; $3: its address. It reads a line once its link is there.
_MACHINE = """
set -e
hostname "$2"
mount -t tmpfs tmpfs "$1/$2"
for place in /root /tmp /run; do
    mkdir -p "$1/$2/upper$place" "$1/$2/work$place"
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$1/$2/upper$place,workdir=$1/$2/work$place" $place
done
mount -t tmpfs tmpfs /dev/shm
rm -rf /root/.ray /root/.ssh /tmp/ray
mkdir -p /run/sshd
cp "$1/bashrc" /root/.bashrc
read -r _
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
ip route add default dev eth0
exec "$(command -v sshd)" -D -e -f "$1/sshd_config"
"""


def why_not() -> str | None:
    """Why there can be no such machines here; None where there can."""
    if sys.platform != "linux":
        return "namespaces need Linux"
    if os.geteuid() != 0:
        return "namespaces, links and sshd need root"
    if missing := sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None}):
        return f"to be installed: {' '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "true"], capture_output=True, text=True, check=False
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def wait_until(what: str, true: Callable[[], bool], timeout_s: float) -> float:
    """Polls; returns the seconds it took.

    Raises:
        TimeoutError: saying what did not happen.
    """
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - start


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        pid: of its first process, as seen from here.
        link: the bridge's end of its cable.
    """

    name: str
    address: str
    pid: int
    link: str
    world: World

    def run(
        self, *command: str | Path, timeout_s: float = 120, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command there, in the environment of its shell and `env`; shows what it said where it fails."""
        done = subprocess.run(
            self._inside(command, env), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *command: str | Path, log: Path, **env: str) -> subprocess.Popen[bytes]:
        """Starts a command there; it ends with the machine at the latest."""
        with log.open("wb") as file:
            return subprocess.Popen(self._inside(command, env), stdout=file, stderr=file)

    def _inside(self, command: Sequence[str | Path], env: dict[str, str]) -> list[str]:
        # The home that sshd gives, whatever ours is called.
        script = 'export HOME=/root; source ~/.bashrc; exec "$@"'
        settings = [f"{name}={value}" for name, value in env.items()]
        return [
            *("nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", "-i", "--"),
            *("bash", "-c", script, "-", "env", *settings, *map(str, command)),
        ]

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of a name that run there."""
        return [process for found, process in self._all() if found == name]

    def names(self) -> set[str]:
        """Of the processes that run there, but for the first one."""
        return {name for name, _ in self._all()}

    def _all(self) -> Iterator[tuple[str, psutil.Process]]:
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield process.name(), process

    def memory_mib(self) -> float:
        """What all processes there hold, shared pages counted once."""
        total = 0
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / (1 << 20)

    def cut(self) -> None:
        """Pulls the cable."""
        self.world.ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        self.world.ip("link", "set", self.link, "up")


@dataclass
class World:
    """The machines and what they share.

    Attributes:
        folder: of this world, deleted at its end; all machines see it, under the same path.
        pid: of its first process.
    """

    folder: Path
    pid: int
    machines: list[Machine] = field(default_factory=list)

    @property
    def shared(self) -> Path:
        """What the machines see as SHARED, as seen from here."""
        return self.folder / "shared"

    @property
    def key(self) -> Path:
        """The private key that opens every machine."""
        return self.folder / "key"

    def ip(self, *arguments: str) -> None:
        """`ip` on the bridge's side."""
        subprocess.run(["nsenter", "-t", str(self.pid), "-n", "ip", *arguments], check=True)

    def add(self, name: str, address: str) -> Machine:
        """One more machine, up and answering SSH."""
        (self.folder / name).mkdir()
        command = [
            "nsenter",
            "-t",
            str(self.pid),
            "-n",
            "-m",
            "-p",
            "unshare",
            "-n",
            "-m",
            "-p",
            "-u",
            "-i",
            "-f",
        ]
        command += [
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            _MACHINE,
            "-",
            str(self.folder),
            name,
            address,
        ]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        pid = _descendant(process.pid, 2)  # nsenter, unshare, and the first process of the new namespace
        link = f"to-{name}"
        self.ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self.ip("link", "set", link, "master", "bridge", "up")
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        machine = Machine(name, address, pid, link, self)
        answers = ["bash", "-c", f"</dev/tcp/{address}/22"]
        wait_until(
            f"sshd answers on {name}", lambda: machine.run(*answers, check=False).returncode == 0, READY_S
        )
        self.machines.append(machine)
        return machine


@contextlib.contextmanager
def new_world(environment: dict[str, str] | None = None) -> Iterator[World]:
    """A world without machines, and afterwards nothing of it.

    Args:
        environment: what the shells on its machines get, besides a PATH that has this Python and a PYTHONPATH that has
            this checkout.

    Raises:
        AssertionError: something is left of it.
    """
    # Not in /tmp: each machine has its own.
    folder = Path(tempfile.mkdtemp(prefix="raytune-", dir="/var/tmp"))
    process = None
    try:
        (folder / "shared").mkdir()
        _write_keys(folder)
        _write_bashrc(folder, environment or {})
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "-n",
            "-m",
            "-p",
            "-f",
            "--kill-child",
            "--mount-proc",
        ]
        process = subprocess.Popen([*command, "bash", "-c", _WORLD, "-", str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the namespaces could not be made"
        yield World(folder, _descendant(process.pid, 1))
    finally:
        if process is not None:
            _end(process)
        assert not mounts_below(folder), "mounts are left"
        shutil.rmtree(folder)


def mounts_below(folder: Path) -> list[str]:
    """Mounts that the machine at large sees below a folder."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a world, and waits until none of its processes is left."""
    inside = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(inside, timeout=READY_S)
    assert not alive, f"processes are left: {alive}"


def _descendant(pid: int, generations: int) -> int:
    """The only child of the only child ..., once it is there."""
    process = psutil.Process(pid)
    for _ in range(generations):
        parent = process
        wait_until("a namespace has its first process", lambda p=parent: bool(p.children()), READY_S)
        (process,) = parent.children()
    return process.pid


def _write_keys(folder: Path) -> None:
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/key.pub\n"
        "StrictModes no\n"  # /var/tmp is open to all
        "PermitRootLogin prohibit-password\n"
        "PidFile none\n"
        "MaxStartups 100\n"
    )


def _write_bashrc(folder: Path, environment: dict[str, str]) -> None:
    """What every shell on a machine starts with; a login shell forgets the PATH it was given."""
    checkout = Path(__file__).parents[2]
    lines = [
        f'export PATH="{Path(sys.executable).parent}:$PATH"',
        f'export PYTHONPATH="{checkout}"',
        "export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 TQDM_DISABLE=1",
        # Several machines share the CPUs of one: threads of one would wait for those of another, starts take longer.
        "export OMP_THREAD_LIMIT=1 RAY_agent_register_timeout_ms=120000",
        *(f'export {name}="{value}"' for name, value in environment.items()),
    ]
    (folder / "bashrc").write_text("\n".join(lines) + "\n")
