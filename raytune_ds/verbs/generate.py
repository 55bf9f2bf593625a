"""`raytune-ds generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from raytune_ds.console import out, say
from raytune_ds.errors import UserError
from raytune_ds.verbs.answers import add_model, sampling, user

SUMMARY = "answer prompts with a finished run"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(verb)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is streamed")
    source.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or JSON lines with prompt or messages"
    )
    verb.add_argument("--output", metavar="FILE", help="write JSON lines there instead of printing")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.generate import Generator, read_prompts, write_answers, write_now

    conversations = read_prompts(arguments.prompts) if arguments.prompts else [user(arguments.prompt)]
    if arguments.output and Path(arguments.output).exists():
        raise UserError(f"--output {arguments.output}: is there already; choose another name.")
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise UserError(f"--output {arguments.output}: there is no such folder.")
    if arguments.system:
        conversations = [[{"role": "system", "content": arguments.system}, *c] for c in conversations]
    generator = Generator.of_run(arguments.run_dir)
    if arguments.prompt and not arguments.output:
        generator.stream(conversations[0], sampling(arguments), write_now)
        write_now("\n")
        return 0
    answers = generator.answer(conversations, sampling(arguments))
    if arguments.output:
        write_answers(conversations, answers, Path(arguments.output))
        say(f"{len(conversations)} answers written to {arguments.output}")
    else:
        for conversation, answer in zip(conversations, answers, strict=True):
            out.print(f"> {conversation[-1]['content']}", style="dim", markup=False)
            say(answer)
    return 0
