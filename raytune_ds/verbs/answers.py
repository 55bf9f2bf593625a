"""The arguments that `chat`, `generate` and `serve` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytune_ds.generate import Generator
    from raytune_ds.sampling import Sampling


def add_model(verb: argparse.ArgumentParser) -> None:
    """The run, or a directory."""
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", dest="run_dir", metavar="DIR", help="the directory of a finished run")
    which.add_argument(
        "--model", dest="model_dir", metavar="DIR", help="a Hugging Face model or peft adapter directory"
    )


def add_sampling(verb: argparse.ArgumentParser) -> None:
    """What is said before a question, and how answers are sampled."""
    verb.add_argument("--system", metavar="TEXT", help="a system message")
    verb.add_argument(
        "--compare-base", action="store_true", help="the answers of the model before training too"
    )
    verb.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the longest answer, in tokens (256)"
    )
    verb.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time (0)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (1.0)")
    verb.add_argument(
        "--top-k", type=int, default=0, help="samples from the K likeliest tokens (0: from all)"
    )
    verb.add_argument(
        "--min-p", type=float, default=0.0, help="leaves out tokens below this share of the likeliest (0)"
    )
    verb.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (1.0)")
    verb.add_argument("--seed", type=int, help="of the random numbers, for the same answers again")
    verb.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given again"
    )


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def sampling(arguments: argparse.Namespace) -> Sampling:
    """How tokens are chosen, as the command line says.

    Raises:
        UserError: a value makes no sense.
    """
    from raytune_ds.sampling import Sampling as _Sampling

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return _Sampling(**{name: getattr(arguments, name) for name in names}, stop=tuple(arguments.stop))


def generator(arguments: argparse.Namespace) -> Generator:
    """The model that the command line names.

    Raises:
        UserError: it can't be loaded.
    """
    from raytune_ds.errors import UserError
    from raytune_ds.generate import Generator as _Generator
    from raytune_ds.rundir import RunDir

    if arguments.run_dir:
        return _Generator.of_run(arguments.run_dir)
    folder = Path(arguments.model_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--model {arguments.model_dir}: there is no such directory.")
    if found := RunDir.of_final(str(folder.absolute())):  # whose run knows how its base model was held
        return _Generator.of_run(found[0].path)
    return _Generator.of_directory(folder.absolute())


def base(arguments: argparse.Namespace, tuned: Generator) -> Generator | None:
    """The model before training, if it is asked for.

    Raises:
        UserError: nobody knows what it was, or it can't be loaded.
    """
    from raytune_ds.errors import UserError

    if not arguments.compare_base:
        return None
    if tuned.has_adapter:
        return tuned.base()
    if not arguments.run_dir:
        raise UserError(
            f"--compare-base: {arguments.model_dir} does not say what it was trained from; give --run in place of it."
        )
    from raytune_ds.trained import began_with

    return tuned.base(began_with(arguments.run_dir))
