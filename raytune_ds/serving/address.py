"""Where a server listens, and the token that others than this machine need; loads nothing, so mistakes show at once."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from raytune_ds.errors import UserError

TOKEN = "RAYTUNE_DS_SERVE_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
"""The names by which a machine calls itself."""


def token_for(host: str, environment: Mapping[str, str]) -> str | None:
    """The token that requests have to bring; None where none is needed, which is on loopback.

    Raises:
        UserError: one is needed, and there is none.
    """
    token = environment.get(TOKEN, "").strip()
    if not token and not is_loopback(host):
        raise UserError(
            f"--host {host}: others can reach it, so a token is wanted. Set {TOKEN} in the environment (such as: "
            f"export {TOKEN}=$(openssl rand -hex 32)); clients send it as their API key."
        )
    return token or None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that nobody is let in before the model is there; port 0 is any free one.

    Raises:
        UserError: the address is taken, or not ours.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: a port is a number up to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: can't be listened on ({error.strerror}). Choose another port."
        ) from error
    return bound
