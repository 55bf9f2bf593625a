"""Ray Serve with vLLM, on GPU nodes."""

from __future__ import annotations

import threading
from typing import Any

from raytune_ds import cluster
from raytune_ds.console import say
from raytune_ds.errors import UserError
from raytune_ds.stopping import stoppable


def serve(settings: dict[str, Any], names: list[str], host: str, port: int) -> None:
    """Serves until a signal comes.

    Args:
        settings: arguments of LLMConfig.
        names: by which clients call it.
        host: to listen on.
        port: to listen on.

    Raises:
        UserError: vLLM is not installed.
        Stopped: a signal came.
    """
    from ray import serve as ray_serve

    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise UserError(
            "--engine vllm: vLLM is not installed. Install it by: pip install 'ray[llm]'"
        ) from error
    say(f"Ray: {cluster.connect(debug=False)}", style="dim")
    app = build_openai_app({"llm_configs": [LLMConfig(**settings)]})
    ray_serve.start(http_options={"host": host, "port": port})
    try:
        with stoppable():
            ray_serve.run(app, name="raytune_ds")
            say(f"serving {' and '.join(names)} at http://{host}:{port}/v1; Ctrl-C ends it")
            threading.Event().wait()
    finally:
        ray_serve.shutdown()
