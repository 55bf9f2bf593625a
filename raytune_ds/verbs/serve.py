"""`raytune-ds serve`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from raytune_ds.console import say
from raytune_ds.errors import UserError
from raytune_ds.verbs.answers import add_model, generator

SUMMARY = "serve a finished run to OpenAI's clients"
NEEDED = ("fastapi", "uvicorn", "openai")
MAX_WAITING = 1024


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
        help="vllm is Ray Serve on GPUs; auto takes it where there are both GPU and vLLM, and it can serve this",
    )
    verb.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        help=f"requests that may wait beside them ({MAX_WAITING}); vllm queues by rules of its own",
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    for name, least in (("max_concurrency", 1), ("max_waiting", 0), ("max_model_len", 2)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: {least} or more is wanted.")
    if arguments.engine == "transformers" or (arguments.engine == "auto" and not _has_vllm()):
        _by_transformers(arguments)
        return 0
    source = _source(arguments)
    try:
        settings, names = _for_vllm(arguments, source)
    except UserError as error:
        if arguments.engine == "vllm":
            raise
        say(f"served by transformers, not vLLM: {str(error).splitlines()[0]}")
        _by_transformers(arguments)
        return 0
    from raytune_ds.serving.rayserve import serve

    serve(settings, names, arguments.host, arguments.port)
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
    waiting = MAX_WAITING if arguments.max_waiting is None else arguments.max_waiting
    serve(model, Line(model, arguments.max_concurrency, waiting), served, bound)


def _for_vllm(arguments: argparse.Namespace, source: Source) -> tuple[dict[str, Any], list[str]]:
    """What Ray Serve is told, and the names by which clients call what is served.

    Raises:
        UserError: vLLM can't serve it, or not as it is asked for.
    """
    from raytune_ds.serving.address import TOKEN, is_loopback
    from raytune_ds.serving.vllm import Wanted, served_names, settings

    if not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host}: Ray Serve asks nobody for a token, so it is served on loopback only; put what "
            "does ask (nginx, an ingress) in front of it, or choose --engine transformers."
        )
    if os.environ.get(TOKEN, "").strip():
        raise UserError(
            f"{TOKEN} is set, and Ray Serve asks nobody for a token; it listens on loopback only. Unset it (env -u "
            f"{TOKEN} raytune-ds serve ...) if that will do, or choose --engine transformers, which asks for it."
        )
    if arguments.max_waiting is not None:
        raise UserError(
            f"--max-waiting {arguments.max_waiting}: has no effect on vLLM, which queues by rules of its own; leave it "
            "out, or choose --engine transformers."
        )
    wanted = Wanted(
        _name(arguments),
        source.folder,
        arguments.max_model_len,
        arguments.max_concurrency,
        source.trust_remote_code,
        source.quantization,
    )
    return settings(wanted), served_names(wanted)


class Source(NamedTuple):
    """Where the adapter or model lies, anywhere, and how its base model was held in training."""

    folder: str
    trust_remote_code: bool
    quantization: str


def _source(arguments: argparse.Namespace) -> Source:
    from raytune_ds import storage
    from raytune_ds.rundir import RunDir

    if arguments.model_dir:
        folder = storage.absolute(arguments.model_dir)
        return Source(folder, False, _trained_on(folder))
    run, config = RunDir.finished(arguments.run_dir)
    model = config["model"]
    return Source(run.final, bool(model["trust_remote_code"]), model.get("quantization", "none"))


def _trained_on(folder: str) -> str:
    """`model.quantization` of the run whose final/ a folder is; "none" too where it is nobody's."""
    from raytune_ds.rundir import RunDir

    found = RunDir.of_final(folder)
    return str(found[1]["model"].get("quantization", "none")) if found else "none"


def _name(arguments: argparse.Namespace) -> str:
    given = str(arguments.run_dir or arguments.model_dir)
    return arguments.name or Path(given).expanduser().absolute().name


def _context(arguments: argparse.Namespace, known: int) -> int:
    wanted = arguments.max_model_len or known
    if wanted > known:
        raise UserError(f"--max-model-len {wanted}: the model reads {known} tokens at most.")
    return int(wanted)
