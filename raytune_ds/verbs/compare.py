"""`raytune-ds compare`."""

from __future__ import annotations

import argparse

SUMMARY = "runs side by side: a table, and their curves"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    verb.add_argument("runs", nargs="*", metavar="RUN", help="run directories, two or more")
    verb.add_argument("--plot", metavar="FILE", help="draw the loss curves into a .png or .svg file too")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.compare import compare

    compare(arguments.runs, arguments.plot)
    return 0
