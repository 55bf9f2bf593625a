"""A model directory that llama.cpp's convert_hf_to_gguf.py takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raytune_ds.errors import UserError
from raytune_ds.modelfiles import ExportError

ARCHITECTURES = (
    "DeepseekForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
"""Of DeepSeek's models and their distillations, those that llama.cpp converts: TEXT_MODEL_MAP in
https://github.com/ggml-org/llama.cpp/blob/master/conversion/__init__.py"""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json")


def require_known(architecture: str) -> None:
    """Has llama.cpp know the architecture.

    Raises:
        UserError: it does not.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"--to gguf-ready: llama.cpp does not convert {architecture}; it does {', '.join(ARCHITECTURES)}.\n"
            "--to merged makes a model that transformers and vLLM load."
        )


def prepare(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a merged model's directory one that llama.cpp reads.

    Args:
        folder: of the merged model; changed.
        base: that of the base model, for the files of its slow tokenizer.
        tokenizer: of the merged model; its chat template goes where llama.cpp looks for it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for code in folder.glob("*.py"):
        code.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    for name in _SLOW_FILES:
        if (base / name).is_file() and not (folder / name).exists():
            shutil.copy(base / name, folder)


def check(folder: Path, rows: int, dtypes: set[torch.dtype], has_template: bool) -> list[str]:
    """Whether llama.cpp will find what it needs.

    Args:
        folder: what `prepare` has made.
        rows: of the embedding.
        dtypes: of the weights.
        has_template: whether the tokenizer has a chat template.

    Returns:
        What people should know, a line each.

    Raises:
        ExportError: something is missing.
    """
    config, kept = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    tokens = _tokens(folder / "tokenizer.json")
    if wrong := dtypes - set(_DTYPES):
        raise ExportError(f"llama.cpp does not read weights in {', '.join(map(str, wrong))}")
    if config.get("vocab_size") != rows:
        raise ExportError(f"config.json says {config.get('vocab_size')} tokens, and the embedding has {rows}")
    if has_template and not kept.get("chat_template"):
        raise ExportError("tokenizer_config.json holds no chat template")
    if "auto_map" in config or "auto_map" in kept or list(folder.glob("*.py")):
        raise ExportError("the model would need code of its own")
    if over := [token for token, number in tokens.items() if number >= rows]:
        raise ExportError(
            f"the tokenizer has tokens that the embedding of {rows} has no rows for: {over[:3]}"
        )
    unused = sorted(set(range(rows)) - set(tokens.values()))
    if not unused:
        return []
    return [
        f"{len(unused)} of {rows} rows of the embedding have no token, as in the base model; llama.cpp names them "
        f"[PAD{unused[0]}]" + (f" to [PAD{unused[-1]}]" if len(unused) > 1 else "")
    ]


def next_command(folder: Path, dtype: str) -> str:
    """What to type in a checkout of llama.cpp; `dtype` as config.json spells it."""
    return f"python convert_hf_to_gguf.py {folder} --outfile {folder.name}.gguf --outtype {_OUTTYPES[dtype]}"


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name} is missing, or damaged: {error}") from error


def _tokens(path: Path) -> dict[str, int]:
    """All tokens of a tokenizer.json, those added later too."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ExportError("there is no tokenizer.json: the tokenizer has no fast form")
    return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
