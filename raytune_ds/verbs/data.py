"""`raytune-ds data`."""

from __future__ import annotations

import argparse
import shlex
import sys

from raytune_ds.command import add_config_arguments
from raytune_ds.errors import UserError

SUMMARY = "prepare data and show what will be trained on"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_config_arguments(verb)
    verb.add_argument("--examples", type=int, default=3, metavar="N", help="examples to show (3)")
    verb.add_argument(
        "--run",
        dest="run_dir",
        metavar="DIR",
        help="with --step: the rows of steps of this run, and nothing else",
    )
    verb.add_argument(
        "--step",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="a step of --run, trained on yet or not; may be given several times",
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    if arguments.run_dir is not None or arguments.step:
        return _data_of_steps(arguments)
    from raytune_ds.compose import compose, dump

    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    from raytune_ds import cluster
    from raytune_ds.check import check
    from raytune_ds.data.page import write_page
    from raytune_ds.data.show import show
    from raytune_ds.launch import assign

    checked = check(config, to_train=False)
    cluster.connect(arguments.debug)
    assignment = assign(checked)
    show(assignment.store, assignment.tokenizer, arguments.examples)
    write_page(assignment.store, assignment.tokenizer, _as_typed(arguments), dump(config))
    return 0


def _as_typed(arguments: argparse.Namespace) -> str:
    files = [word for file in arguments.config for word in ("--config", file)]
    return shlex.join(["raytune-ds", "data", *files, *arguments.overrides])


def _data_of_steps(arguments: argparse.Namespace) -> int:
    if arguments.run_dir is None or not arguments.step:
        raise UserError("--run and --step go together: raytune-ds data --run DIR --step 120")
    if arguments.config or arguments.overrides:
        raise UserError("--run: the run has its own config; leave --config and key=value out.")
    from raytune_ds.steps import show_steps

    show_steps(arguments.run_dir, arguments.step)
    return 0
