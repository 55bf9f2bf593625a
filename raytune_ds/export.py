"""What the user takes home: an adapter that peft loads, or a model that transformers loads. Read back before it is
called saved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raytune_ds import storage
from raytune_ds.rundir import RunDir


class ExportError(Exception):
    """What was written is not what is in memory."""


def save_final(run: RunDir, model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> int:
    """Writes `final/`, reads it back, and only then puts it in place.

    Args:
        run: where it goes.
        model: a peft model, saved as its adapter, or a plain one, saved whole.
        tokenizer: saved along, chat template included.
        dtype: of a whole model's weights on disk; an adapter keeps its own.

    Returns:
        Its size in bytes.

    Raises:
        ExportError: what was written differs from what is in memory.
        OSError: it can't be written.
    """
    with tempfile.TemporaryDirectory(prefix="raytune-final-") as scratch:
        local = Path(scratch)
        tensors = (
            _save_adapter(model, local) if hasattr(model, "peft_config") else _save_model(model, local, dtype)
        )
        tokenizer.save_pretrained(local)
        _compare(local, tensors)
        storage.delete_dir(run.final)
        storage.upload_dir(local, run.final)
        return sum(file.stat().st_size for file in local.rglob("*") if file.is_file())


def _save_adapter(model: nn.Module, target: Path) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # peft would otherwise ask the hub whether the vocabulary has grown.
    model.save_pretrained(str(target), save_embedding_layers=False)  # type: ignore[operator]
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _save_model(model: nn.Module, target: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    assert isinstance(model, PreTrainedModel)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    model.config.dtype = dtype
    model.save_pretrained(target, state_dict=tensors)
    return {}


def _compare(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Reads all weights below `folder` back: finite, and equal to `tensors` where those name them.

    Raises:
        ExportError: they differ, or there are none.
    """
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118  # not a dict
                tensor = saved.get_tensor(name)
                found.add(name)
                if not torch.isfinite(tensor).all():
                    raise ExportError(f"{name} in {file.name} is not finite")
                if name in tensors and not torch.equal(tensor, tensors[name].cpu()):
                    raise ExportError(f"{name} in {file.name} is not what is in memory")
    missing = set(tensors) - found
    if missing or not found:
        raise ExportError(f"not written: {', '.join(sorted(missing)[:5]) or 'any weights'}")
