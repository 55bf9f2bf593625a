"""What the server takes and refuses, and the line in which requests wait; no network but a socket that nobody calls."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from raytune_ds import cli
from raytune_ds.data.formats import Example
from raytune_ds.errors import UserError
from raytune_ds.generate import Generator
from raytune_ds.model import tiny
from raytune_ds.sampling import Sampling
from raytune_ds.serving.address import TOKEN, bind, token_for
from raytune_ds.serving.app import Served, build, default_sampling
from raytune_ds.serving.asked import Asked, Refused
from raytune_ds.serving.line import Closed, Full, Line, Seat
from tests.unit.test_generate import QUESTIONS, asked

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 200
URL = "/v1/chat/completions"
HOST = {"host": "127.0.0.1:8000"}


@pytest.fixture(scope="module")
def generator(tiny_models: dict[str, Path]) -> Generator:
    return Generator.of_directory(tiny_models["qwen2"], device="cpu")


@pytest.fixture
def line(generator: Generator) -> Iterator[Line]:
    made = Line(generator, num_seats=4, max_waiting=2)
    made.start()
    yield made
    made.cancel()
    made.join(30)


def served(token: str | None = None) -> Served:
    return Served("law", CONTEXT, "127.0.0.1", token)


@pytest.fixture
def client(generator: Generator, line: Line) -> TestClient:
    return TestClient(build(generator, line, served()), headers=HOST, raise_server_exceptions=False)


def body(**more: Any) -> dict[str, Any]:
    return {"model": "law", "messages": asked("tea"), "temperature": 0, "max_tokens": 6, **more}


def refused(response: Any) -> tuple[int, str]:
    """Status and message of a refusal, which has OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"]


# ---- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n": 2}, "n: "),
        ({"logprobs": True}, "logprobs: "),
        ({"frequency_penalty": 0.5}, "frequency_penalty: "),
        ({"logit_bias": {"5": 1}}, "logit_bias: "),
        ({"response_format": {"type": "json_object"}}, "response_format.type: "),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"functions": []}, "functions: Extra inputs"),
        ({"temperature": 3}, "temperature: "),
        ({"temperature": "nan"}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop = "),
        ({"stop": "x" * 201}, "stop"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "unknown role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts of text",
        ),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"max_completion_tokens": CONTEXT}, f"{CONTEXT} tokens at most"),
        ({"messages": asked("word " * CONTEXT)}, f"{CONTEXT} tokens at most"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(
    client: TestClient, more: dict[str, Any], words: str
) -> None:
    status, message = refused(client.post(URL, json=body(**more)))
    assert status == 400
    assert words in message


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True},
        {
            "response_format": {"type": "text"},
            "tool_choice": "auto",
            "top_logprobs": None,
            "seed": -3,
            "top_k": -1,
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "tea"}]}]},
    ],
)
def test_what_changes_nothing_is_taken(client: TestClient, more: dict[str, Any]) -> None:
    expected = client.post(URL, json=body()).json()["choices"]
    assert client.post(URL, json=body(**more)).json()["choices"] == expected


def test_requests_that_are_none(client: TestClient) -> None:
    for text in ("{", "[]", "", json.dumps(body(messages=asked("\ud800"))), "[" * 10_000):
        assert refused(client.post(URL, content=text, headers={"content-type": "application/json"}))[0] == 400
    assert (
        refused(client.post(URL, content=json.dumps(body()), headers={"content-type": "text/plain"}))[0]
        == 415
    )
    assert refused(client.post(URL, json=body(model="other"))) == (
        404,
        "there is no model 'other' here; this is 'law'.",
    )
    assert refused(client.get(URL))[0] == 405
    assert refused(client.get("/v1/nothing"))[0] == 404
    assert refused(client.get("/v1/models/nothing"))[0] == 404
    assert client.get("/v1/models/law").json()["max_model_len"] == CONTEXT
    status, message = refused(client.post(URL, json=body(messages=asked("x" * 2**20))))
    assert (status, "65536 bytes" in message) == (413, True)


def test_settings_reach_the_generator(client: TestClient, generator: Generator) -> None:
    def said(**more: Any) -> dict[str, Any]:
        return dict(client.post(URL, json=body(**more)).json()["choices"][0])

    def ours(how: Sampling) -> str:
        return next(generator.answer([asked("tea")], how))

    assert said(max_completion_tokens=9)["message"]["content"] == ours(Sampling(9))
    assert said(repetition_penalty=1.7)["message"]["content"] == ours(Sampling(6, repetition_penalty=1.7))
    sampled = {"temperature": 1.4, "top_p": 0.9, "top_k": 40, "min_p": 0.001, "seed": 5}
    assert said(**sampled)["message"]["content"] == ours(Sampling(6, **sampled))
    free = ours(Sampling(6))
    stopped = said(stop=[free[2:4], "never"])
    assert stopped["message"]["content"] == free[: free.index(free[2:4])]
    assert stopped["finish_reason"] == "stop"


def test_without_a_limit_an_answer_has_all_the_room(client: TestClient, generator: Generator) -> None:
    free = {k: v for k, v in body(messages=asked("What?")).items() if k != "max_tokens"}
    reply = client.post(URL, json=free).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == CONTEXT


def test_what_a_request_leaves_out_is_as_the_model_says(generator: Generator) -> None:
    known = generator.model.generation_config
    assert default_sampling(generator) == {"temperature": 1.0}
    known.do_sample, known.temperature, known.top_p = True, 0.6, 0.95
    try:
        how = Asked.read(json.dumps({"model": "law", "messages": asked("x"), "top_p": 0.5}).encode())
        sampling = how.sampling(50, default_sampling(generator))
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.6, 0.5, 50)
    finally:
        known.do_sample, known.temperature, known.top_p = False, None, None


def test_the_prompt_is_that_of_training(generator: Generator) -> None:
    """Tools and calls of earlier turns too; what a user writes does not become a control token."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages = [
        *asked(f"Weather? {tiny.EOS}"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    request = Asked.read(json.dumps({"model": "law", "messages": messages, "tools": tools}).encode())
    as_trained = [
        *asked(f"Weather? {tiny.EOS}"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
            ],
        },
        {"role": "tool", "content": "rain"},
    ]
    ours = generator.prompt_ids(request.conversation(), request.offered, request.thinking)
    assert ours == generator.prompt_ids(as_trained, tools)
    literals = generator._literals
    text = literals.text(ours)
    guarded = literals.guarded(Example(tuple(as_trained), tuple(tools)))
    assert "weather" in text
    assert '{"town": "Ulm"}' in text
    rendered = generator._template.render(guarded.messages, guarded.tools, generate=True)
    assert ours == literals.ids([rendered])[0]
    without = request.model_copy(update={"tool_choice": "none"})
    assert without.offered == []


@pytest.mark.parametrize("name", ["thinking", "enable_thinking"])
def test_the_thinking_switch_is_passed_on(name: str) -> None:
    raw = {"model": "law", "messages": asked("x"), "chat_template_kwargs": {name: True}}
    assert Asked.read(json.dumps(raw).encode()).thinking is True
    with pytest.raises(Refused, match="chat_template_kwargs"):
        Asked.read(json.dumps({**raw, "chat_template_kwargs": {"other": 1}}).encode())


def test_calls_stay_text_with_their_marks(client: TestClient, generator: Generator) -> None:
    """The marks of a call are special tokens of some tokenizers; without tools they are left out."""
    generator.model.generation_config.suppress_tokens = None
    prompt = generator.prompt_ids(asked("tea"))
    mark = generator.tokenizer.convert_tokens_to_ids("<｜tool▁calls▁begin｜>")
    for with_special, text in ((True, "<｜tool▁calls▁begin｜>"), (False, "")):
        answer = generator.ask(prompt, Sampling(5), with_special=with_special)
        for token in (mark, min(generator.ends)):
            answer.take(token)
        assert (answer.text, answer.finish) == (text, "stop")


def test_a_stream_is_as_openai_has_it(client: TestClient) -> None:
    def events(**more: Any) -> list[str]:
        text = client.post(URL, json=body(stream=True, **more)).text
        return [event.removeprefix("data: ") for event in text.split("\n\n") if event]

    plain, counted = events(), events(stream_options={"include_usage": True})
    assert plain[-1] == counted[-1] == "[DONE]"
    first, *_, last = (json.loads(event) for event in plain[:-1])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert not any("usage" in event for event in plain)
    usage = json.loads(counted[-2])
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 6)
    assert len({json.loads(event)["id"] for event in plain[:-1]}) == 1
    assert refused(client.post(URL, json=body(stream=True, n=3)))[0] == 400


# ---- who may come in ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({"authorization": "Bearer right"}, 200),
        ({"authorization": "bearer right"}, 200),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer rightly"}, 401),
        ({"authorization": "Bearer r\u00e4cht".encode("latin-1")}, 401),
        ({"authorization": "Basic right"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({}, 401),
    ],
)
def test_the_token_opens_the_door(generator: Generator, line: Line, header: Any, status: int) -> None:
    client = TestClient(build(generator, line, served("right")), headers={"host": "models.example"})
    assert client.get("/v1/models", headers=header).status_code == status
    assert client.post(URL, json=body(), headers=header).status_code == status
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example:8000", 403),
    ],
)
def test_without_a_token_no_web_page_gets_in_by_another_name(
    client: TestClient, host: str, status: int
) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_beyond_loopback_a_token_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert token_for(host, {}) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "a.host"):
        with pytest.raises(UserError, match=TOKEN):
            token_for(host, {TOKEN: "  "})
        assert token_for(host, {TOKEN: "secret"}) == "secret"
    assert token_for("127.0.0.1", {TOKEN: "secret"}) == "secret"
    assert cli.main(["serve", "--run", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert TOKEN in capsys.readouterr().err


def test_a_taken_port_is_said_before_the_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--run", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another port" in capsys.readouterr().err
    with pytest.raises(UserError, match="65535"):
        bind("127.0.0.1", 70000)
    assert cli.main(["serve", "--run", "nowhere", "--port", "0", "--max-concurrency", "0"]) == 2
    assert "--max-concurrency 0" in capsys.readouterr().err


# ---- the line -------------------------------------------------------------------------------------


class Waiter:
    """A seat, and whether it has ended."""

    def __init__(self, generator: Generator, length: int, question: str = "tea", write: Any = None) -> None:
        self.done, self.error = threading.Event(), None
        answer = generator.ask(generator.prompt_ids(asked(question)), Sampling(length), write=write)
        self.seat = Seat(answer, self._end)

    def _end(self, error: Exception | None) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()

    def wait(self) -> str | None:
        assert self.done.wait(60)
        return self.seat.answer.finish


class Gatekeeper:
    """Stops the thread that answers at the first text of an answer, until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, _: str) -> None:
        self.reached.set()
        assert self.go.wait(60)


def test_a_full_line_says_so_and_then_moves_on(generator: Generator, line: Line) -> None:
    """Four seats and two who wait: the seventh is turned away, and comes in later."""
    keeper = Gatekeeper()
    first = Waiter(generator, 30, write=keeper)
    line.put(first.seat)
    assert keeper.reached.wait(60)
    others = [Waiter(generator, 8, question) for question in QUESTIONS]
    for waiter in others:
        line.put(waiter.seat)
    with pytest.raises(Full):
        line.put(Waiter(generator, 8).seat)
    keeper.go.set()
    assert [waiter.wait() for waiter in (first, *others)] == ["length"] * 6
    last = Waiter(generator, 8)
    line.put(last.seat)
    assert last.wait() == "length"


def test_who_comes_later_joins_a_batch_that_is_running(generator: Generator, line: Line) -> None:
    """And ends before the long answer that was there; what both say is not changed by it."""
    keeper, order = Gatekeeper(), []
    long = Waiter(generator, 120, "What?", keeper)
    line.put(long.seat)
    assert keeper.reached.wait(60)
    late = Waiter(generator, 5)
    line.put(late.seat)
    keeper.go.set()
    assert late.wait() == "length"
    order.append(long.done.is_set())
    assert long.wait() == "length"
    assert order == [False]
    for waiter, question, length in ((long, "What?", 120), (late, "tea", 5)):
        alone = generator.ask(generator.prompt_ids(asked(question)), Sampling(length))
        generator.run([alone])
        assert waiter.seat.answer.ids == alone.ids


def test_who_is_cancelled_stops_at_the_next_token(generator: Generator, line: Line) -> None:
    keeper = Gatekeeper()
    first = Waiter(generator, 120, write=keeper)
    line.put(first.seat)
    assert keeper.reached.wait(60)
    first.seat.cancel()
    keeper.go.set()
    assert first.wait() == "cancelled"
    assert len(first.seat.answer.ids) < 10


def test_a_failing_model_fails_its_batch_alone(
    generator: Generator, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(generator, "run", fail)
        one = Waiter(generator, 5)
        line.put(one.seat)
        one.wait()
        assert str(one.error) == "CUDA out of memory"
        client = TestClient(build(generator, line, served()), headers=HOST)
        status, message = refused(client.post(URL, json=body()))
        assert (status, message) == (500, "the model failed: CUDA out of memory")
    after = Waiter(generator, 5)
    line.put(after.seat)
    assert after.wait() == "length"


def test_a_closed_line_answers_who_is_in_it(generator: Generator, line: Line) -> None:
    keeper = Gatekeeper()
    first = Waiter(generator, 20, write=keeper)
    line.put(first.seat)
    assert keeper.reached.wait(60)
    line.close()
    with pytest.raises(Closed):
        line.put(Waiter(generator, 5).seat)
    keeper.go.set()
    assert first.wait() == "length"
    client = TestClient(build(generator, line, served()), headers=HOST)
    assert client.get("/health").status_code == 503
    assert refused(client.post(URL, json=body()))[0] == 503


def test_nobody_waits_for_ever_when_all_is_cancelled(generator: Generator) -> None:
    line, keeper = Line(generator, num_seats=1, max_waiting=5), Gatekeeper()
    line.start()
    first, second = Waiter(generator, 120, write=keeper), Waiter(generator, 5)
    line.put(first.seat)
    assert keeper.reached.wait(60)
    line.put(second.seat)
    line.cancel()
    keeper.go.set()
    assert [first.wait(), second.wait()] == ["cancelled", "cancelled"]
    line.join(60)
    assert not line.is_open
