"""`raytune-ds render`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raytune_ds.command import add_config_arguments
from raytune_ds.console import err, say
from raytune_ds.errors import UserError

SUMMARY = "the files of a cluster for a run"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    from raytune_ds.deploy.render import TARGETS

    add_config_arguments(verb)
    verb.add_argument(
        "--target", required=True, metavar="TARGET", help=f"what the file is for: {', '.join(TARGETS)}"
    )
    verb.add_argument("--output", metavar="FILE", help="write it there instead of printing it")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.aliases import close
    from raytune_ds.compose import compose, dump
    from raytune_ds.deploy.render import TARGETS, describe, render

    if arguments.target not in TARGETS:
        near = close(arguments.target, tuple(TARGETS), 0.6)
        raise UserError(
            f"--target {arguments.target}: "
            + (f"did you mean {near[0]}? " if near else "")
            + f"There are {', '.join(TARGETS)}."
        )
    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    text, layout = render(config, arguments.target)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        _write_new(arguments.output, text)
        say(f"written to {arguments.output}, which begins with how it is used")
    err.print(describe(layout), markup=False)
    return 0


def _write_new(path: str, text: str) -> None:
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"--output {path}: is there already; choose another name.") from error
    except OSError as error:
        raise UserError(f"--output {path}: can't be written: {error.strerror}") from error
