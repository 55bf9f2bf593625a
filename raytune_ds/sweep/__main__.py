"""`python -m raytune_ds.sweep`: searches settings.

python -m raytune_ds.sweep --config my.yaml                             the default space, for my model and data
python -m raytune_ds.sweep --config my.yaml --config sweep.yaml --promote  mine; and trains the best to the end
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from raytune_ds.command import add_config_arguments, guarded, parser
from raytune_ds.compose import compose, dump
from raytune_ds.confighelp import help_text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failed run, 2 for a mistake of the user's."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _sweep(arguments), debug=arguments.debug)


def _sweep(arguments: argparse.Namespace) -> int:
    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    # A mistake in the space is told before Ray and torch are imported.
    from raytune_ds.sweep.space import check_space

    check_space(config)
    from raytune_ds.sweep.run import sweep

    swept = sweep(config, debug=arguments.debug)
    if arguments.promote:
        from raytune_ds.sweep.promote import promote

        promote(config, swept, anew=arguments.promote == "anew")
    return 0


def _parser() -> argparse.ArgumentParser:
    command = parser("raytune_ds.sweep", "Searches the settings of a run.", epilog=help_text)
    add_config_arguments(command)
    command.add_argument(
        "--promote",
        nargs="?",
        const="continue",
        choices=("continue", "anew"),
        help="then train the best trial to the full budget: from its checkpoint where its settings allow it "
        "(continue, the default), or from the start (anew)",
    )
    return command


if __name__ == "__main__":
    sys.exit(main())
