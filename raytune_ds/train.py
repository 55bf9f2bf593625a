"""`python -m raytune_ds.train`: fine-tunes a model.

python -m raytune_ds.train                                 embedded Ray, a tiny model, bundled data
python -m raytune_ds.train --config my.yaml adapter.r=16   your model, your data
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
    return guarded(lambda: _train(arguments), debug=arguments.debug)


def _train(arguments: argparse.Namespace) -> int:
    config = compose(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(dump(config))
        return 0
    # Ray is imported only once the config is known to be right.
    from raytune_ds.startup import Startup, process_began, uncollected

    startup = Startup(process_began())
    startup.mark("config read")
    with uncollected():
        from raytune_ds import early
        from raytune_ds.stopping import stoppable

        where = early.begin(config, arguments.debug)
        if where is not None:
            startup.mark("connected")
        with stoppable():  # it takes a while to import
            from raytune_ds.launch import launch

    launch(config, arguments.debug, startup, where)
    return 0


def _parser() -> argparse.ArgumentParser:
    command = parser("raytune_ds.train", "Fine-tunes a model.", epilog=help_text)
    add_config_arguments(command)
    return command


if __name__ == "__main__":
    sys.exit(main())
