"""`raytune-ds chat`."""

from __future__ import annotations

import argparse

from raytune_ds.verbs.answers import add_model, sampling

SUMMARY = "talk to a finished run"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(verb)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.generate import Generator, chat

    chat(Generator.of_run(arguments.run_dir), sampling(arguments), arguments.system)
    return 0
