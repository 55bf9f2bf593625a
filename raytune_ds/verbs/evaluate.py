"""`raytune-ds evaluate`."""

from __future__ import annotations

import argparse

SUMMARY = "how good a finished run is, beside the model it began with"


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    verb.add_argument("--run", required=True, dest="run_dir", metavar="DIR", help="the run directory")
    verb.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows to measure losses and answers on, beside the run's own held-out ones",
    )
    verb.add_argument(
        "--general", nargs="+", default=[], metavar="FILE", help="rows of what should not have been forgotten"
    )
    verb.add_argument(
        "--tasks", default="", metavar="a,b", help="tasks of lm-eval (pip install 'raytune_ds[lm-eval]')"
    )
    verb.add_argument("--include-path", metavar="DIR", help="a folder of lm-eval tasks of your own")
    verb.add_argument("--limit", type=_positive, metavar="N", help="take N rows of each (all)")
    verb.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="rows at a time (16)")
    verb.add_argument("--no-base", action="store_true", help="leave the base model out")
    verb.add_argument(
        "--num-workers",
        type=_not_negative,
        metavar="N",
        help="workers of Ray Data, each with a model of its own; 0: no Ray (one a GPU; two where there is none)",
    )
    verb.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="the longest answer, in tokens (somewhat more than the longest expected one)",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the confidence intervals (0)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from raytune_ds.evaluate import Wish, evaluate

    wish = Wish(
        data=tuple(arguments.data),
        general=tuple(arguments.general),
        tasks=tuple(name for name in arguments.tasks.split(",") if name),
        include_path=arguments.include_path,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        with_base=not arguments.no_base,
        num_workers=arguments.num_workers,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    evaluate(arguments.run_dir, wish, arguments.debug)
    return 0


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is below {least}")
    return number
