"""The arguments that `chat` and `generate` share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytune_ds.generate import Sampling


def add_model(verb: argparse.ArgumentParser) -> None:
    """The run, and how its answers are sampled."""
    verb.add_argument("--run", required=True, dest="run_dir", metavar="DIR", help="the run directory")
    verb.add_argument("--system", metavar="TEXT", help="a system message")
    verb.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the longest answer, in tokens (256)"
    )
    verb.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time (0)"
    )
    verb.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (1.0)")


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def sampling(arguments: argparse.Namespace) -> Sampling:
    """How tokens are chosen, as the command line says."""
    from raytune_ds.generate import Sampling as _Sampling

    return _Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
