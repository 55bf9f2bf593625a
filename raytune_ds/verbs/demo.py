"""`raytune-ds demo`."""

from __future__ import annotations

import argparse

SUMMARY = "the bundled demo: a tiny model learns a domain"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    verb.add_argument(
        "--storage", default="~/raytune_ds", metavar="DIR", help="where the runs go (~/raytune_ds)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.demo.run import demo

    demo(arguments.storage, debug=arguments.debug)
    return 0
