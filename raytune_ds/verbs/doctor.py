"""`raytune-ds doctor`."""

from __future__ import annotations

import argparse
import sys

from raytune_ds.command import add_config_arguments

SUMMARY = "what this node or a cluster has, and what to mend"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_config_arguments(verb)
    verb.add_argument(
        "--cluster", action="store_true", help="all nodes of the Ray cluster, not this one alone"
    )
    verb.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.compose import compose, dump
    from raytune_ds.doctor.verb import doctor

    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    return doctor(config, on_cluster=arguments.cluster, json=arguments.json, debug=arguments.debug)
