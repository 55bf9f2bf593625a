"""`raytune-ds VERB` and `python -m raytune_ds VERB`. What a verb needs is imported when it is used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from raytune_ds.command import guarded, parser
from raytune_ds.verbs import (
    chat,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    render,
    serve,
    verify,
)

VERBS = {
    "data": data,
    "chat": chat,
    "generate": generate,
    "export": export,
    "serve": serve,
    "evaluate": evaluate,
    "compare": compare,
    "verify": verify,
    "render": render,
    "doctor": doctor,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a failed run, 2 for a mistake of the user's."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["train"]:
        from raytune_ds import train

        return train.main(given[1:])
    if given[:1] == ["sweep"]:
        from raytune_ds.sweep import __main__ as sweep

        return sweep.main(given[1:])
    arguments = _parser().parse_args(given)
    return guarded(lambda: arguments.run(arguments) or 0, debug=arguments.debug)


def _parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="raytune-ds", description="Fine-tunes DeepSeek-family models on Ray."
    )
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("train", add_help=False, help="fine-tune a model (also: python -m raytune_ds.train)")
    verbs.add_parser(
        "sweep", add_help=False, help="search the settings of a run (also: python -m raytune_ds.sweep)"
    )
    for name, module in VERBS.items():
        base = parser(f"raytune-ds {name}", module.SUMMARY)
        verb = verbs.add_parser(name, help=module.SUMMARY, parents=[base], add_help=False)
        module.add(verb)
        verb.set_defaults(run=module.run)
    return command


if __name__ == "__main__":
    sys.exit(main())
