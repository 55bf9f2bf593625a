"""One process that serves a model from memory, and how it ends: answers have a while to be finished."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import Any

import uvicorn

from raytune_ds.console import say
from raytune_ds.generate import Generator
from raytune_ds.serving.app import Served, build
from raytune_ds.serving.line import Line
from raytune_ds.stopping import stoppable

GRACE_S = 5.0
"""How long answers go on behind the first signal."""
LAST_TOKEN_S = 30.0
"""How long one token may take, behind which it is given up."""


def serve(generator: Generator, line: Line, served: Served, bound: socket.socket) -> None:
    """Serves until a signal comes.

    Raises:
        Stopped: it came.
    """
    config = uvicorn.Config(
        build(generator, line, served),
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="off",
        # Behind this it is cut off; by then every answer has been ended.
        timeout_graceful_shutdown=int(GRACE_S + LAST_TOKEN_S),
    )
    # What is loaded by now stays: collecting it would hold up answers, and the end of the process by seconds.
    gc.freeze()
    line.start()
    try:
        with stoppable():
            _Server(config, line, served, bound).run(sockets=[bound])
    finally:
        line.cancel()
        line.join(LAST_TOKEN_S)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, line: Line, served: Served, bound: socket.socket) -> None:
        super().__init__(config)
        self._line, self._served, self._address = line, served, bound.getsockname()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self._address[:2]
        host = f"[{host}]" if ":" in host else host
        guarded = (
            "with the token as API key" if self._served.token else "no token needed, from this machine only"
        )
        say(f"serving {self._served.name} at http://{host}:{port}/v1 ({guarded}); Ctrl-C ends it")

    async def shutdown(self, sockets: Any = None) -> None:
        self._line.close()
        asyncio.get_running_loop().call_later(GRACE_S, self._line.cancel)
        await super().shutdown(sockets)
