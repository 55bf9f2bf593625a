"""Answers in a terminal: a conversation that is streamed, and the model before and after training side by side."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from raytune_ds.console import out, say
from raytune_ds.generate import Generator
from raytune_ds.sampling import Sampling


def chat(generator: Generator, sampling: Sampling, system: str | None, base: Generator | None = None) -> None:
    """A conversation in the terminal: answers are streamed and the history is kept. Ctrl-D or /exit ends it.

    With a `base`, that answers first; the conversation goes on with the answer of `generator`.
    """
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    say("Ask away. /new forgets the conversation, /exit or Ctrl-D ends it.", style="dim")
    while (question := _ask()) is not None:
        if question == "/new":
            history = list(opening)
        elif question:
            history.append({"role": "user", "content": question})
            if base is not None:
                stream_answer(base, history, sampling, "before: ")
            answer = stream_answer(generator, history, sampling, "after:  " if base else "")
            history.append({"role": "assistant", "content": answer})


def stream_answer(
    generator: Generator, conversation: list[dict[str, Any]], sampling: Sampling, label: str = ""
) -> str:
    """One answer to the terminal as it is made, behind `label`; returned whole."""
    if label:
        out.print(label, style="dim", end="")
    answer = generator.stream(conversation, sampling, write_now)
    write_now("\n")
    return answer


def show_both(rows: list[tuple[str, str, str]]) -> None:
    """(prompt, answer before training, answer after it) in columns."""
    drawn = Table(show_lines=True)
    for name in ("prompt", "before", "after"):
        drawn.add_column(name, overflow="fold", ratio=1)
    for row in rows:
        drawn.add_row(*map(Text, row))
    out.print(drawn, soft_wrap=False)


def write_now(text: str) -> None:
    """Text to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _ask() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line == "/exit" else line
