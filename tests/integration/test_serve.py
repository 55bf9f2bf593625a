"""The real `raytune-ds serve`, talked to by the official openai client."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from raytune_ds.generate import Generator
from raytune_ds.sampling import Sampling
from tests.unit.test_generate import QUESTIONS, as_run, asked, save_adapter

TOKEN = "a-token-of-these-tests"
END_S = 20


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str

    def client(self, key: str = TOKEN) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def health(self) -> dict[str, object]:
        return dict(httpx.get(self.url.removesuffix("/v1") + "/health").json())

    def end(self, number: signal.Signals) -> tuple[int, float, str]:
        """Its exit code, how many seconds it took, and what it said on stderr."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=END_S)
        return self.process.returncode, time.monotonic() - began, errors


@contextmanager
def serving(*arguments: str, token: str | None = TOKEN) -> Iterator[Server]:
    """`python -m raytune_ds serve` on a free port, up and running."""
    environment = {k: v for k, v in os.environ.items() if k != "RAYTUNE_DS_SERVE_TOKEN"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"RAYTUNE_DS_SERVE_TOKEN": token} if token else {})
    command = [sys.executable, "-m", "raytune_ds", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Server(process, _address(process))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:  # ends when the process does
        if " at http" in line:
            url = line.partition(" at ")[2].partition(" ")[0]
            assert httpx.get(url.removesuffix("/v1") + "/health").json()["status"] == "ok"
            return url
    raise AssertionError(f"it did not come up: {process.communicate()[1]}")


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_S
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)  # between two looks, not in place of one


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    final = save_adapter(tiny_models["deepseek-v3"], root / "adapter")
    return as_run(root / "medical", tiny_models["deepseek-v3"], final)


@pytest.fixture(scope="module")
def tuned(run: Path) -> Generator:
    return Generator.of_run(str(run), "cpu")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving("--run", str(run), "--max-concurrency", "16") as started:
        yield started


def test_answers_are_those_of_the_generator(server: Server, tuned: Generator) -> None:
    client = server.client()
    expected = list(tuned.answer([asked(q) for q in QUESTIONS], Sampling(12)))
    how = {"model": "medical", "temperature": 0, "max_tokens": 12}
    for question, answer in zip(QUESTIONS, expected, strict=True):
        reply = client.chat.completions.create(messages=asked(question), **how)
        assert reply.choices[0].message.content == answer
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(tuned.prompt_ids(asked(question)))
        assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (
            12,
            12 + reply.usage.prompt_tokens,
        )
        pieces = [*client.chat.completions.create(messages=asked(question), stream=True, **how)]
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == answer
        assert [p.choices[0].finish_reason for p in pieces if p.choices[0].finish_reason] == ["length"]
        assert all(p.usage is None for p in pieces)
    assert [model.id for model in client.models.list()] == ["medical"]


def test_200_requests_at_once_and_none_is_lost(server: Server, tuned: Generator) -> None:
    """Each with a question, a length and a way to be asked of its own."""
    questions = [f"{QUESTIONS[n % len(QUESTIONS)]} {n}" for n in range(200)]
    lengths = [4 + n % 9 for n in range(200)]

    async def one(client: openai.AsyncOpenAI, number: int) -> str | None:
        how = {
            "model": "medical",
            "temperature": 0,
            "max_tokens": lengths[number],
            "messages": asked(questions[number]),
        }
        if number % 2:
            return (await client.chat.completions.create(**how)).choices[0].message.content
        stream = await client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **how
        )
        pieces = [piece async for piece in stream]
        assert pieces[-1].usage.completion_tokens == lengths[number]
        return "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)

    async def everyone() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key=TOKEN, max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    answers = asyncio.run(everyone())
    prompts = [tuned.prompt_ids(asked(q)) for q in questions]
    expected = [tuned.ask(p, Sampling(n)) for p, n in zip(prompts, lengths, strict=True)]
    for start in range(0, 200, 50):
        tuned.run(expected[start : start + 50])
    assert answers == [answer.text for answer in expected]
    assert server.health() == {"status": "ok", "waiting": 0, "running": 0}


def test_the_token_is_asked_for(server: Server) -> None:
    for key in ("wrong", TOKEN + "x", TOKEN[:-1]):
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(key).models.list()
        assert caught.value.code == "invalid_api_key"
    response = httpx.post(f"{server.url}/chat/completions", json={})
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert TOKEN not in response.text


def test_a_prompt_of_a_megabyte_is_refused_clearly(server: Server) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 98304 bytes") as caught:
        server.client().chat.completions.create(model="medical", messages=asked("word " * 200_000))
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="4096 tokens at most") as caught:
        server.client().chat.completions.create(model="medical", messages=asked("word " * 10_000))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens is 4096"):
        server.client().chat.completions.create(model="medical", messages=asked("word"), max_tokens=4096)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_answered_no_further(server: Server, stream: bool) -> None:
    body = {
        "model": "medical",
        "messages": asked("tea"),
        "temperature": 0,
        "max_tokens": 3000,
        "stream": stream,
    }
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        if stream:
            with client.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                until(lambda: server.health()["running"] == 1, "it was not begun")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/chat/completions", json=body, timeout=1)
    until(lambda: server.health()["running"] == 0, "it goes on for nobody")


def test_ctrl_c_ends_it_cleanly(run: Path) -> None:
    """Short answers are finished, a long one is ended, nobody sees a traceback, and nothing is left."""
    with serving("--run", str(run), token=None) as server:
        how = {"model": "medical", "messages": asked("tea"), "temperature": 0, "stream": True}
        long, short = (server.client().chat.completions.create(max_tokens=n, **how) for n in (4000, 20))
        next(iter(long))
        code, seconds, errors = server.end(signal.SIGINT)
        assert [*short][-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.APIError, match="shutting down"):
            list(long)
    assert code == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert seconds < END_S
    with pytest.raises(httpx.ConnectError):
        server.health()


def test_sigterm_ends_one_that_has_nothing_to_do(server: Server) -> None:
    """The last test of this server."""
    code, seconds, errors = server.end(signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in errors
    assert seconds < END_S
