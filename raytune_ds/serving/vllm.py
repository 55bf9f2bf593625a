"""What Ray Serve is told to serve a run with vLLM; loads neither of them.

An adapter is served as it is, on its base model, by the name `MODEL:final` (LoRA multiplexing: Ray fetches the folder
`final` of the run when that is asked for first, and the base answers to `MODEL`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytune_ds import storage
from raytune_ds.errors import UserError
from raytune_ds.servable import RANKS, refusals

# What `dynamic_lora_loading_path` of ray.serve.llm may begin with (Ray 2.60).
BUCKETS = ("s3://", "gs://", "abfss://", "azure://")


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for.

    Attributes:
        name: of the model, as clients call it.
        folder: an adapter's or a model's, anywhere.
        max_model_len: tokens of a prompt and its answer; None leaves it to the model.
        max_concurrency: requests answered at once.
        trust_remote_code: as `model.trust_remote_code`.
        quantization: as `model.quantization`, of the base model that the adapter was trained on.
    """

    name: str
    folder: str
    max_model_len: int | None
    max_concurrency: int
    trust_remote_code: bool = False
    quantization: str = "none"


def settings(wanted: Wanted) -> dict[str, Any]:
    """The arguments of `ray.serve.llm.LLMConfig`.

    Raises:
        UserError: vLLM can't serve it.
    """
    engine: dict[str, Any] = {"max_num_seqs": wanted.max_concurrency}
    if wanted.max_model_len:
        engine["max_model_len"] = wanted.max_model_len
    if wanted.trust_remote_code:
        engine["trust_remote_code"] = True
    if ":" in wanted.name:
        raise UserError(f"--name {wanted.name}: a colon is what tells adapters apart; choose another name.")
    adapter = storage.read_json(f"{wanted.folder}/adapter_config.json")
    if adapter is None:
        return _config(wanted.name, wanted.folder, engine)
    _check(adapter, wanted)
    engine |= {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(rank for rank in RANKS if rank >= adapter["r"]),
    }
    if template := chat_template(wanted.folder):  # or it would be the base's, which training may have changed
        engine["chat_template"] = template
    run, _, _ = wanted.folder.rpartition("/")
    return {
        **_config(wanted.name, adapter["base_model_name_or_path"], engine),
        "lora_config": {"dynamic_lora_loading_path": run, "max_num_adapters_per_replica": 1},
    }


def served_names(wanted: Wanted) -> list[str]:
    """By which names clients call what is served: the tuned model first."""
    if not storage.exists(f"{wanted.folder}/adapter_config.json"):
        return [wanted.name]
    return [f"{wanted.name}:{wanted.folder.rpartition('/')[2]}", wanted.name]


def chat_template(folder: str) -> str | None:
    """Of a tokenizer's directory anywhere."""
    path = f"{folder}/chat_template.jinja"
    if storage.exists(path):
        return storage.read_bytes(path).decode()
    template = (storage.read_json(f"{folder}/tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


def _check(adapter: Mapping[str, Any], wanted: Wanted) -> None:
    folder = wanted.folder
    instead = (
        "Merge it, and serve that: raytune-ds export --run DIR --to merged, then raytune-ds serve --model DIR. "
        "Or serve it by --engine transformers."
    )
    if reasons := refusals(adapter):
        raise UserError(f"{folder}: vLLM can't serve this adapter: {'; '.join(reasons)}.\n{instead}")
    if wanted.quantization != "none":
        raise UserError(
            f"{folder}: was trained on its base model held in {wanted.quantization}, and vLLM would put it on the "
            f"unquantised one, which it was not trained on.\n{instead}"
        )
    if not folder.startswith(BUCKETS):
        raise UserError(
            f"{folder}: Ray Serve fetches adapters from {', '.join(BUCKETS)} only, and this one is a local folder. Put "
            f"the run there, and name it so: --run {BUCKETS[0]}BUCKET/RUN.\n{instead}"
        )


def _config(name: str, source: str, engine: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_loading_config": {"model_id": name, "model_source": source},
        "engine_kwargs": engine,
    }
