"""The addresses: /v1/chat/completions, /v1/models and /health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from raytune_ds.errors import UserError, first_line
from raytune_ds.generate import Generator
from raytune_ds.serving.asked import Asked, Refused
from raytune_ds.serving.gate import Gate, read_body
from raytune_ds.serving.line import Closed, Full, Line, Seat
from raytune_ds.serving.replies import DONE, Reply, error_body, error_event

# A token is a few bytes of text, and JSON may write a byte as six.
BYTES_PER_TOKEN = 24
LEAST_BODY, MOST_BODY = 2**16, 2**26
GONE = Refused(503, "the server is shutting down.", "shutting_down")


@dataclass(frozen=True)
class Served:
    """What is served, and to whom.

    Attributes:
        name: of the model, as clients call it.
        context: tokens of a prompt and its answer together, at most.
        host: it listens on.
        token: clients have to bring; None lets in all of this machine.
    """

    name: str
    context: int
    host: str
    token: str | None

    @property
    def largest_body(self) -> int:
        """Bytes of a request that may still fit into the context."""
        return min(max(LEAST_BODY, self.context * BYTES_PER_TOKEN), MOST_BODY)


def build(generator: Generator, line: Line, served: Served) -> FastAPI:
    """The application, with `line` answering."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(Gate, token=served.token, host=served.host)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _refuse_path)
    desk = _Desk(generator, line, served)
    app.add_api_route("/v1/chat/completions", desk.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", desk.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", desk.model, methods=["GET"])
    app.add_api_route("/health", desk.health, methods=["GET"], response_model=None)
    return app


class _Desk:
    """Takes requests and hands out replies."""

    def __init__(self, generator: Generator, line: Line, served: Served) -> None:
        self._generator, self._line, self._served = generator, line, served
        self._created = int(time.time())
        self._defaults = default_sampling(generator)
        # Long prompts take a while to tokenize, in which streams go on.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def chat(self, request: Request) -> Response:
        """A completion, or a stream of it."""
        asked = Asked.read(await read_body(request, self._served.largest_body))
        self._check_name(asked.model)
        prompt = await asyncio.get_running_loop().run_in_executor(self._reader, self._prompt, asked)
        ticket = _Ticket(self._generator, asked, prompt, self._sampling(asked, len(prompt)))
        try:
            self._line.put(ticket.seat)
        except Full:
            raise Refused(429, "too many requests are waiting; try again later.", "overloaded") from None
        except Closed:
            raise GONE from None
        reply = Reply(self._served.name)
        if asked.stream:
            return _Stream(ticket, reply, bool(asked.stream_options and asked.stream_options.include_usage))
        await ticket.wait(request)
        return JSONResponse(reply.whole(ticket.seat.answer))

    async def models(self) -> dict[str, Any]:
        """The one that is there."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """What is known of it."""
        self._check_name(name)
        return self._card()

    async def health(self) -> Response:
        """Whether requests are answered."""
        fine = self._line.is_open
        counts = {"waiting": self._line.num_waiting, "running": self._line.num_running}
        return JSONResponse({"status": "ok" if fine else "closed", **counts}, 200 if fine else 503)

    def _card(self) -> dict[str, Any]:
        card = {"id": self._served.name, "object": "model", "created": self._created}
        return {**card, "owned_by": "raytune_ds", "max_model_len": self._served.context}

    def _check_name(self, name: str) -> None:
        if name != self._served.name:
            message = f"there is no model {name!r} here; this is {self._served.name!r}."
            raise Refused(404, message, "model_not_found", "model")

    def _prompt(self, asked: Asked) -> list[int]:
        try:
            return self._generator.prompt_ids(asked.conversation(), asked.offered, asked.thinking)
        except UserError as error:
            raise Refused(400, str(error), param="messages") from None

    def _sampling(self, asked: Asked, num_read: int) -> Any:
        room = self._served.context - num_read
        if room < max(asked.longest or 1, 1):
            written = f" and max_tokens is {asked.longest}" if asked.longest else ""
            raise Refused(
                400,
                f"the model reads and writes {self._served.context} tokens at most; the messages have {num_read}"
                f"{written}.",
                "context_length_exceeded",
                "messages",
            )
        return asked.sampling(room, self._defaults)


class _Ticket:
    """A request in line, on the side of the event loop."""

    def __init__(self, generator: Generator, asked: Asked, prompt: list[int], sampling: Any) -> None:
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._error: Exception | None = None

        def write(piece: str | None) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        def ended(error: Exception | None) -> None:
            self._error = error
            write(None)

        answer = generator.ask(prompt, sampling, write=write, with_special=bool(asked.offered))
        self.seat = Seat(answer, ended)

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it is written.

        Raises:
            Refused: it came to no end.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._error is not None:
            raise Refused(500, f"the model failed: {first_line(self._error)[:200]}", "model_failed")
        if self.seat.answer.finish == "cancelled":
            raise GONE

    async def wait(self, request: Request) -> None:
        """Until it is written whole, or the client has gone.

        Raises:
            Refused: it came to no end.
        """
        written = asyncio.create_task(self._drain())
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({written, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not written.done():
                self.seat.cancel()
            await written
        finally:
            self.seat.cancel()
            gone.cancel()

    async def _drain(self) -> None:
        async for _ in self.pieces():
            pass


class _Stream(StreamingResponse):
    """Server-sent events; when the client goes, or has never listened, the answer ends."""

    def __init__(self, ticket: _Ticket, reply: Reply, with_usage: bool) -> None:
        super().__init__(_events(ticket, reply, with_usage), media_type="text/event-stream")
        self._ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.seat.cancel()


async def _gone(request: Request) -> None:
    """Until the client of a request whose body has been read is gone: nothing else comes."""
    await request.receive()


async def _events(ticket: _Ticket, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    yield reply.piece({"role": "assistant", "content": ""})
    try:
        async for piece in ticket.pieces():
            yield reply.piece({"content": piece})
    except Refused as refused:
        yield error_event(refused)
        return
    answer = ticket.seat.answer
    yield reply.piece({}, answer.finish)
    if with_usage:
        yield reply.usage(answer)
    yield DONE


def default_sampling(generator: Generator) -> dict[str, Any]:
    """What a request leaves out: as the model's generation config says, if it samples; else as OpenAI has it."""
    known = generator.model.generation_config
    if not known.do_sample:
        return {"temperature": 1.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(known, name, None)) is not None}
    return {"temperature": 1.0, **given}


async def _refuse(_: Request, refused: Any) -> Response:
    headers = {"Retry-After": "1"} if refused.status == 429 else None
    return JSONResponse(error_body(refused), refused.status, headers)


async def _refuse_path(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(Refused(error.status_code, message)), error.status_code)
