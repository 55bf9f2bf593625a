"""`raytune-ds chat`."""

from __future__ import annotations

import argparse

from raytune_ds.verbs.answers import add_model, add_sampling, base, generator, sampling

SUMMARY = "talk to a finished run, or to a model or adapter directory"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(verb)
    add_sampling(verb)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.terminal import chat

    how, tuned = sampling(arguments), generator(arguments)
    chat(tuned, how, arguments.system, base(arguments, tuned))
    return 0
