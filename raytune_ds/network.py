"""The network interface by which the nodes of a cluster reach each other: what gloo and NCCL have to be told.

Left alone, gloo takes the interface that the host's name stands for, which is loopback on many machines: the ranks of
other nodes then get an address that is only good on its own node.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

import psutil

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The interface that carries an IP address of this node; None if none does (behind address translation)."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return None


def own_address() -> str:
    """The IP address that this node reaches others from; loopback where it has no network. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(
                ("203.0.113.1", 9)
            )  # an address kept for examples: only the route to it is asked for
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def use_interface_of(address: str, environment: MutableMapping[str, str]) -> None:
    """Tells gloo and NCCL to use the interface that carries `address`, where the user has not told them another."""
    if (name := interface_of(address)) is not None:
        environment.setdefault(GLOO, name)
        environment.setdefault(NCCL, f"={name}")  # a bare name would mean eth10 too


def problem(environment: Mapping[str, str]) -> str | None:
    """What is wrong with the interfaces that the user has set on this node of several; None if nothing is."""
    for variable in (GLOO, NCCL):
        wanted = environment.get(variable)
        if not wanted:
            continue
        if not (chosen := _matching(variable, wanted)):
            names = ", ".join(name for name in psutil.net_if_addrs() if not _is_loopback(name))
            return f"{variable} = {wanted}: there is no such network interface; there is {names or 'none'}"
        if all(map(_is_loopback, chosen)):
            return f"{variable} = {wanted}: other nodes can't be reached by loopback"
    return None


def _matching(variable: str, wanted: str) -> list[str]:
    """The interfaces that a setting means: gloo takes exact names, NCCL beginnings, =names, and ^names to leave out."""
    names = list(psutil.net_if_addrs())
    if variable == GLOO:
        return [name for name in names if name in wanted.split(",")]
    parts = wanted.lstrip("^=").split(",")
    exact = wanted.lstrip("^").startswith("=")
    matching = [n for n in names if any(n == p if exact else n.startswith(p) for p in parts)]
    return [name for name in names if name not in matching] if wanted.startswith("^") else matching


def _is_loopback(name: str) -> bool:
    addresses = psutil.net_if_addrs()[name]
    return any(found.address.startswith("127.") or found.address == "::1" for found in addresses)
