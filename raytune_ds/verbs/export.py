"""`raytune-ds export`."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ds import storage
from raytune_ds.errors import UserError

if TYPE_CHECKING:
    from raytune_ds.origin import Origin

SUMMARY = "take a finished run's adapter or model elsewhere: merged, for llama.cpp, to the hub"
KINDS = ("adapter", "merged", "gguf-ready")


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="run_dir", metavar="DIR", help="the run directory")
    source.add_argument(
        "--merge-adapters",
        nargs="+",
        metavar="DIR",
        help="runs or peft directories of one base model, to make one LoRA adapter of",
    )
    verb.add_argument(
        "--to",
        choices=KINDS,
        help="adapter: as peft loads it (the default of --merge-adapters); merged: a model as transformers loads it, "
        "in the base model's precision; gguf-ready: one that llama.cpp converts",
    )
    verb.add_argument("--output", metavar="DIR", help="the directory to make (DIR of --run/exports/KIND)")
    verb.add_argument(
        "--no-compare",
        dest="compare",
        action="store_false",
        help="do not load the merged model and the adapter, one after the other, to compare their logits",
    )
    verb.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face hub; wants HF_TOKEN")
    verb.add_argument("--private", action="store_true", help="of a repository that --push makes")
    verb.add_argument(
        "--combination",
        default="linear",
        metavar="KIND",
        help="peft's combination_type (linear), such as cat or ties",
    )
    verb.add_argument(
        "--weights", nargs="+", type=float, metavar="N", help="of each adapter (1 / their number for each)"
    )
    verb.add_argument(
        "--density", type=float, metavar="SHARE", help="of values kept, by ties, dare and the like"
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of what dare drops (0)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    if arguments.to is None:
        if arguments.run_dir is not None:
            raise UserError(f"--to is missing: choose one of {', '.join(KINDS)}.")
        arguments.to = "adapter"
    if arguments.push:  # before anything is read
        from raytune_ds.push import token_for

        token_for(arguments.push)
    target = Path(_target(arguments)).expanduser().absolute()
    from raytune_ds.takehome import Request, deliver

    with _origin(arguments) as origin:
        deliver(origin, Request(arguments.to, target, arguments.compare, arguments.push, arguments.private))
    return 0


def _target(arguments: argparse.Namespace) -> str:
    output: str | None = arguments.output
    if output is not None:
        if not storage.is_local(output):
            raise UserError(
                f"--output {output}: exports are written to this machine's files; --push uploads one."
            )
        return storage.absolute(output)
    if arguments.run_dir is None:
        raise UserError("--output is missing: where shall the combined adapter go?")
    if not storage.is_local(arguments.run_dir):
        raise UserError(
            f"--run {arguments.run_dir}: is not on this machine; say --output DIR, where to export to."
        )
    return f"{storage.absolute(arguments.run_dir)}/exports/{arguments.to}"


def _origin(arguments: argparse.Namespace) -> AbstractContextManager[Origin]:
    from raytune_ds import combine, origin

    paths = arguments.merge_adapters
    if paths is None:
        if arguments.weights or arguments.density is not None:
            raise UserError("--weights, --density: are of --merge-adapters.")
        return origin.of_run(arguments.run_dir)
    if len(paths) < 2:
        raise UserError("--merge-adapters: takes two adapters or more.")
    if arguments.combination not in combine.COMBINATIONS:
        raise UserError(
            f"--combination {arguments.combination}: choose one of {', '.join(combine.COMBINATIONS)}."
        )
    weights = arguments.weights or [1 / len(paths)] * len(paths)
    return origin.of_adapters(paths, arguments.combination, weights, arguments.density, arguments.seed)
