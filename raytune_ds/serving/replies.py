"""Completions, pieces of streams and errors, made of OpenAI's own types."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from raytune_ds.decode import Answer
from raytune_ds.serving.asked import Refused

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What all pieces of one reply have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A finished answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return ChatCompletion.model_validate(
            {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}
        ).model_dump(exclude_unset=True)

    def piece(self, delta: dict[str, Any], finish: str | None = None) -> str:
        """An event of a stream: some text, who speaks, or why it ended."""
        return self._event([{"index": 0, "delta": delta, "finish_reason": finish}])

    def usage(self, answer: Answer) -> str:
        """The last event of a stream, for whoever asked for it."""
        return self._event([], usage=usage(answer))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = ChatCompletionChunk.model_validate(
            {**self._head("chat.completion.chunk"), "choices": choices, **more}
        )
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(answer: Answer) -> dict[str, int]:
    """Tokens read and written; the end token is one that was written."""
    read, written = len(answer.prompt), len(answer.ids)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def error_body(refused: Refused) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if refused.status == 429 else kind
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


def error_event(refused: Refused) -> str:
    """The same within a stream that has begun."""
    return f"data: {json.dumps(error_body(refused), ensure_ascii=False)}\n\n"
