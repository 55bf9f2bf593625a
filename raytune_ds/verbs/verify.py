"""`raytune-ds verify`."""

from __future__ import annotations

import argparse

SUMMARY = "proof that a run was trained on each row of each epoch once"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    verb.add_argument(
        "--run", required=True, nargs="+", dest="run_dirs", metavar="DIR", help="run directories, one or more"
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.verify import verify

    return verify(arguments.run_dirs)
