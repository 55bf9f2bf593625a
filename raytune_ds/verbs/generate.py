"""`raytune-ds generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ds.console import ProgressLine, out, say
from raytune_ds.errors import UserError
from raytune_ds.verbs.answers import add_model, add_sampling, base, generator, sampling, user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from raytune_ds.decode import Answer
    from raytune_ds.generate import Generator
    from raytune_ds.prompts import Messages
    from raytune_ds.sampling import Sampling

SUMMARY = "answer prompts with a finished run, or a model or adapter directory"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(verb)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is streamed")
    source.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or JSON lines with prompt or messages"
    )
    verb.add_argument("--output", metavar="FILE", help="write JSON lines there instead of printing")
    verb.add_argument(
        "--resume", action="store_true", help="go on where an earlier run stopped writing --output"
    )
    verb.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts answered at once (16)")
    add_sampling(verb)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.prompts import Meter, answered, read_prompts, write_answers

    conversations = read_prompts(arguments.prompts) if arguments.prompts else [user(arguments.prompt)]
    output = _output(arguments)
    if arguments.system:
        conversations = [[{"role": "system", "content": arguments.system}, *c] for c in conversations]
    done = answered(conversations, output) if output and output.exists() else 0
    how = sampling(arguments)
    if done == len(conversations):
        say(f"all {done} answers are in {arguments.output} already")
        return 0
    tuned = generator(arguments)
    before = base(arguments, tuned)
    if output:
        rest = conversations[done:]
        total = len(rest) * (1 if before is None else 2)
        with ProgressLine("answers", total) as line:
            watch = Meter(line, total).watch
            answers = _answers(tuned, before, rest, how, arguments.batch_size, done, watch)
            write_answers(conversations, answers, output, done)
        say(f"{len(conversations) - done} answers written to {arguments.output}")
    else:
        _print(tuned, before, conversations, how, arguments)
    return 0


def _output(arguments: argparse.Namespace) -> Path | None:
    if arguments.batch_size < 1:
        raise UserError("--batch-size: 1 or more is wanted.")
    if not arguments.output:
        if arguments.resume:
            raise UserError("--resume: goes with --output, the file to go on with.")
        return None
    path = Path(arguments.output).expanduser()
    if path.exists() and not arguments.resume:
        raise UserError(
            f"--output {arguments.output}: is there already; choose another name, or go on with it by --resume."
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {arguments.output}: there is no such folder.")
    return path


def _answers(
    tuned: Generator,
    before: Generator | None,
    conversations: Sequence[Messages],
    how: Sampling,
    batch_size: int,
    first: int,
    watch: Callable[[Sequence[Answer]], None] = lambda _: None,
) -> Iterator[dict[str, str]]:
    """What is written of each conversation: `tuned`, and `base` if it was asked too."""
    after = tuned.answer(conversations, how, batch_size, first, watch)
    if before is None:
        yield from ({"tuned": answer} for answer in after)
        return
    bases = before.answer(conversations, how, batch_size, first, watch)
    yield from ({"base": old, "tuned": new} for old, new in zip(bases, after, strict=True))


def _print(
    tuned: Generator,
    before: Generator | None,
    conversations: Sequence[Messages],
    how: Sampling,
    arguments: argparse.Namespace,
) -> None:
    from raytune_ds.terminal import show_both, stream_answer

    if before is None and arguments.prompt:
        stream_answer(tuned, list(conversations[0]), how)
        return
    answers = _answers(tuned, before, conversations, how, arguments.batch_size, 0)
    if before is not None:
        asked = (str(conversation[-1]["content"]) for conversation in conversations)
        show_both([(q, both["base"], both["tuned"]) for q, both in zip(asked, answers, strict=True)])
        return
    for conversation, answer in zip(conversations, answers, strict=True):
        out.print(f"> {conversation[-1]['content']}", style="dim", markup=False)
        say(answer["tuned"])
