"""Files of prompts, and files of the answers to them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raytune_ds.console import ProgressLine
from raytune_ds.decode import Answer
from raytune_ds.errors import UserError

Messages = Sequence[dict[str, Any]]


def read_prompts(path: str) -> list[Messages]:
    """Conversations from a file: plain text, one prompt a line, or JSON lines with `prompt` or `messages`.

    Other columns of JSON lines are left alone: answers come in the order of the prompts, a line each.

    Raises:
        UserError: the file is missing, empty or malformed.
    """
    try:
        # Not splitlines: text may hold other line ends, such as U+2028, as they are.
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: can't be read: {error}") from error
    conversations = [_conversation(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not conversations:
        raise UserError(f"--prompts {path}: there is no prompt in it.")
    return conversations


def _conversation(path: str, number: int, line: str) -> Messages:
    if not path.endswith((".jsonl", ".json")):
        return [{"role": "user", "content": line}]
    try:
        row = json.loads(line)
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        if not isinstance(messages, list) or not messages:
            raise TypeError("messages has to be a list of at least one")
        if not all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
            raise TypeError("role and content of a message have to be text")
        return messages
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--prompts {path}, line {number}: a JSON object with prompt or messages is wanted ({error})."
        ) from error


def answered(conversations: Sequence[Messages], path: Path) -> int:
    """How many of the conversations, the first ones, have answers in the file already; a torn last line is cut off.

    Raises:
        UserError: the file answers something else.
    """
    done = 0
    keep = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            messages = None
            with suppress(ValueError, KeyError, TypeError):
                messages = json.loads(line)["messages"][:-1]
            if done == len(conversations) or messages != list(conversations[done]):
                raise UserError(
                    f"--output {path}, line {done + 1}: answers another prompt than the one that comes {done + 1}. in "
                    "the list. Choose another name."
                )
            done, keep = done + 1, keep + len(line)
    with path.open("r+b") as file:
        file.truncate(keep)
    return done


def write_answers(
    conversations: Sequence[Messages], answers: Iterator[Mapping[str, str]], path: Path, done: int = 0
) -> None:
    """JSON lines of messages, the answer the last of them; after `done` lines that are there already.

    An answer is a mapping of what else its line says, of which `tuned` is the answer: `{"base": ..., "tuned": ...}`
    keeps both, and `{"tuned": ...}` alone says nothing more than the messages.
    """
    with path.open("a", encoding="utf-8") as file:
        for conversation, answer in zip(conversations[done:], answers, strict=True):
            messages = [*conversation, {"role": "assistant", "content": answer["tuned"]}]
            both = dict(answer) if len(answer) > 1 else {}
            file.write(json.dumps({"messages": messages, **both}, ensure_ascii=False) + "\n")
            file.flush()


class Meter:
    """How far a list of prompts is, and how fast; an answer under way counts by its share of the longest."""

    def __init__(self, line: ProgressLine, total: int) -> None:
        """`total` answers are wanted."""
        self._line, self._total, self._started = line, total, time.monotonic()
        self._answers = self._tokens = 0
        self._batch: Sequence[Answer] = ()

    def watch(self, batch: Sequence[Answer]) -> None:
        """Sees a batch behind every token."""
        if batch is not self._batch:
            self._answers += len(self._batch)
            self._tokens += _tokens(self._batch)
            self._batch = batch
        share = sum(1.0 if a.finish else len(a.ids) / a.sampling.max_new_tokens for a in batch)
        ended = self._answers + sum(a.finish is not None for a in batch)
        rate = (self._tokens + _tokens(batch)) / max(time.monotonic() - self._started, 1e-9)
        self._line.update(self._answers + share, f"{ended} of {self._total}  {rate:.0f} tokens/s")


def _tokens(batch: Sequence[Answer]) -> int:
    return sum(len(answer.ids) for answer in batch)
