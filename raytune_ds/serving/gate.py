"""Who may come in: a token in constant time, hosts where there is none, and bodies of a bounded size."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from raytune_ds.serving.address import LOOPBACK
from raytune_ds.serving.asked import Refused
from raytune_ds.serving.replies import error_body

OPEN_PATHS = ("/health",)
# How much of a body that is too large is read and thrown away: a client that is still sending does not hear an answer.
DRAINED_BYTES = 64 * 2**20


class Gate:
    """ASGI middleware that lets in who has the token."""

    def __init__(self, app: Any, token: str | None, host: str) -> None:
        """Without a token, only who asks for this machine by its own names: a web page can't, whatever name it has."""
        self._app, self._token = app, token.encode() if token else None
        self._hosts = (*LOOPBACK, host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] == "http" and (refused := self._refusal(Request(scope))):
            headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
            await JSONResponse(error_body(refused), refused.status, headers)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> Refused | None:
        if request.url.path in OPEN_PATHS:
            return None
        if self._token is None:
            name = request.headers.get("host", "")
            name = name if name.endswith("]") else name.rpartition(":")[0] or name
            return None if name in self._hosts else Refused(403, f"there is no host {name!r} here.")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._token)
        if scheme.lower() == "bearer" and right:
            return None
        return Refused(
            401, "missing or wrong API key: send it as 'Authorization: Bearer ...'.", "invalid_api_key"
        )


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        Refused: it is larger than `limit` bytes, or says that it is no JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body has to be JSON: send 'Content-Type: application/json'.")
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            body += piece
        elif size > limit + DRAINED_BYTES:
            break
    if size > limit:
        raise Refused(
            413,
            f"the request is larger than {limit} bytes, more than the model can read.",
            "request_too_large",
        )
    return bytes(body)
