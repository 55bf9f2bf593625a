"""What the user takes home: an adapter that peft loads, or a model that transformers loads. Read back before it is
called saved.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

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
    with _staging(run) as local:
        if hasattr(model, "peft_config"):
            _compare(local, _save_adapter(model, local))
        else:
            _save_model(model, local, dtype)
        tokenizer.save_pretrained(local)
        size = sum(file.stat().st_size for file in local.rglob("*") if file.is_file())
        storage.delete_dir(run.final)
        if storage.is_local(run.final):
            local.rename(storage.absolute(run.final))
        else:
            storage.upload_dir(local, run.final)
        return size


@contextlib.contextmanager
def _staging(run: RunDir) -> Iterator[Path]:
    """A folder to write to: beside final/ where that is a file tree, so that a rename puts it in place at once."""
    beside = storage.absolute(run.path) if storage.is_local(run.path) else None
    folder = Path(tempfile.mkdtemp(prefix=".final-", dir=beside))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_adapter(model: nn.Module, target: Path) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # peft would otherwise ask the hub whether the vocabulary has grown.
    model.save_pretrained(str(target), save_embedding_layers=False)  # type: ignore[operator]
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _save_model(model: nn.Module, target: Path, dtype: torch.dtype) -> None:
    """Writes a whole model in `dtype`, loads it as anybody would, and compares every weight.

    Raises:
        ExportError: a weight is not finite, or not what it was.
    """
    assert isinstance(model, PreTrainedModel)
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    tensors = {
        name: tensor.to(
            "cpu", dtype if tensor.is_floating_point() and not any(k in name for k in kept) else None
        )
        for name, tensor in model.state_dict().items()
    }
    model.config.dtype = dtype
    model.save_pretrained(target, state_dict=tensors)
    read_back = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).state_dict()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ExportError(f"{name} is not finite")
        if name not in read_back or not torch.equal(read_back[name], tensor):
            raise ExportError(f"{name} is not read back as it was written")


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
