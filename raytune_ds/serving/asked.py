"""A request for a chat completion: what is taken, what is refused, and what it asks of the generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raytune_ds.data.conversation import turns_of
from raytune_ds.data.formats import Message, RowError
from raytune_ds.errors import UserError
from raytune_ds.sampling import Sampling


class Refused(Exception):
    """A request that is not answered: an HTTP status, and what OpenAI's error object says."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        """`code` and `param` as OpenAI has them: 'model_not_found', 'messages' ..."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


# Looked for behind every token.
_Stop = Annotated[str, Field(max_length=200)]


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Text(_Strict):
    type: Literal["text"]


class _TemplateSwitch(_Strict):
    thinking: bool | None = None
    enable_thinking: bool | None = None


class Asked(_Strict):
    """The body of a request to /v1/chat/completions, as far as it can be honoured; all else is refused by name.

    `top_k`, `min_p`, `repetition_penalty` and `chat_template_kwargs` are what other servers take beside OpenAI's own
    fields (`extra_body` of the openai client).
    """

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: _TemplateSwitch | None = None

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    # Only what they are anyway: anything else would change the answer, and not be noticed missing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: _Text | None = None
    modalities: list[Literal["text"]] | None = None

    # Of no effect on an answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    @staticmethod
    def read(body: bytes) -> Asked:
        """From the bytes of a request.

        Raises:
            Refused: they are no such request.
        """
        try:
            return Asked.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(str(part) for part in first["loc"]) or None
            raise Refused(400, f"{param or 'the body'}: {first['msg']}", param=param) from None

    @property
    def longest(self) -> int | None:
        """The longest answer, in tokens, if the request says it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def thinking(self) -> bool | None:
        """How the template's switch is set; None leaves it as it was in training."""
        switch = self.chat_template_kwargs
        if switch is None:
            return None
        return switch.enable_thinking if switch.thinking is None else switch.thinking

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools or []

    def conversation(self) -> list[Message]:
        """Its messages, in the form that training has them in.

        Raises:
            Refused: one is malformed, or has parts that are no text.
        """
        try:
            return [turn.message for turn in turns_of([_plain(m) for m in self.messages], "messages")]
        except RowError as error:
            raise Refused(400, f"messages: {error}", param="messages") from None

    def sampling(self, room: int, defaults: Mapping[str, Any]) -> Sampling:
        """How tokens are chosen.

        Args:
            room: how many tokens an answer can have; what it is without max_tokens.
            defaults: of what the request leaves out, by the names of `Sampling`.

        Raises:
            Refused: a value makes no sense.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        chosen = {**defaults, **given}
        chosen["top_k"] = max(0, chosen.get("top_k", 0))  # -1 is another way to say none
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = None if self.seed is None else self.seed % 2**63
        try:
            return Sampling(max_new_tokens=self.longest or room, seed=seed, stop=stop, **chosen)
        except UserError as error:
            raise Refused(400, str(error), param=str(error).partition(" ")[0]) from None


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as text: clients also send it as a list of parts, or none beside calls of tools."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) != len(content):
            raise Refused(400, "messages: only parts of text can be read.", param="messages")
        return {**message, "content": "\n".join(part["text"] for part in parts)}
    if content is None and message.get("tool_calls"):
        return {key: value for key, value in message.items() if key != "content"}
    return message
