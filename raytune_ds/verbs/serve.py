"""`raytune-ds serve`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from raytune_ds.console import say
from raytune_ds.errors import UserError
from raytune_ds.verbs.answers import add_model, generator

SUMMARY = "serve a finished run to OpenAI's clients"
NEEDED = ("fastapi", "uvicorn", "openai")


def add(verb: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(verb)
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    verb.add_argument("--port", type=int, default=8000, help="port to listen on; 0 is any free one (8000)")
    verb.add_argument("--name", help="of the model, as clients call it (the directory's name)")
    verb.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer (the model's context)",
    )
    verb.add_argument(
        "--max-concurrency", type=int, default=16, metavar="N", help="requests answered at once (16)"
    )
    verb.add_argument(
        "--engine",
        choices=("auto", "transformers", "vllm"),
        default="auto",
        help="vllm is Ray Serve on GPUs; auto takes it where there are both GPU and vLLM",
    )
    verb.add_argument(
        "--max-waiting", type=int, default=1024, metavar="N", help="requests that may wait beside them (1024)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    for name, least in (("max_concurrency", 1), ("max_waiting", 0), ("max_model_len", 2)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: {least} or more is wanted.")
    if arguments.engine == "vllm" or (arguments.engine == "auto" and _has_vllm()):
        _by_vllm(arguments)
    else:
        _by_transformers(arguments)
    return 0


def _has_vllm() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _by_transformers(arguments: argparse.Namespace) -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"serve: {', '.join(missing)} is not installed. Install it by: pip install 'raytune_ds[serve]'"
        )
    from raytune_ds.serving.address import bind, token_for

    token = token_for(arguments.host, os.environ)
    bound = bind(arguments.host, arguments.port)
    say("loading the model ...", style="dim")
    from raytune_ds.serving.app import Served
    from raytune_ds.serving.line import Line
    from raytune_ds.serving.local import serve

    model = generator(arguments)
    served = Served(_name(arguments), _context(arguments, model.context), arguments.host, token)
    serve(model, Line(model, arguments.max_concurrency, arguments.max_waiting), served, bound)


def _by_vllm(arguments: argparse.Namespace) -> None:
    from raytune_ds.serving.address import is_loopback
    from raytune_ds.serving.rayserve import serve
    from raytune_ds.serving.vllm import Wanted, served_names, settings

    if not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host}: Ray Serve asks nobody for a token, so it is served on loopback only; put what "
            "does ask (nginx, an ingress) in front of it, or choose --engine transformers."
        )
    folder, trust = _folder(arguments)
    wanted = Wanted(_name(arguments), folder, arguments.max_model_len, arguments.max_concurrency, trust)
    serve(settings(wanted), served_names(wanted), arguments.host, arguments.port)


def _folder(arguments: argparse.Namespace) -> tuple[str, bool]:
    """Where the adapter or model lies, anywhere, and whether its own code is trusted."""
    from raytune_ds import storage
    from raytune_ds.rundir import RunDir

    if arguments.model_dir:
        return storage.absolute(arguments.model_dir), False
    run = RunDir(storage.absolute(arguments.run_dir))
    config = storage.read_json(run.config)
    if config is None or not storage.exists(run.final):
        raise UserError(f"--run {arguments.run_dir}: no finished run (it has no config.json, or no final/).")
    return run.final, bool(config["model"]["trust_remote_code"])


def _name(arguments: argparse.Namespace) -> str:
    given = str(arguments.run_dir or arguments.model_dir)
    return arguments.name or Path(given).expanduser().absolute().name


def _context(arguments: argparse.Namespace, known: int) -> int:
    wanted = arguments.max_model_len or known
    if wanted > known:
        raise UserError(f"--max-model-len {wanted}: the model reads {known} tokens at most.")
    return int(wanted)
