"""Which kernels compute a model on a worker's device: chosen once, said in one line, and put into the model.

`auto` takes what is known to pay and what is installed, and says nothing of the rest; what is asked for by name is
there or refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_ds.compatible import conflicts
from raytune_ds.config import Config
from raytune_ds.errors import UserError
from raytune_ds.model.attention import PACKED, keep_out_of_graphs, kernel_name

# The version whose sources this module was written by; it knows DeepSeek's architectures.
LIGER_SINCE = (0, 8, 5)
# What liger gives a module of its own.
_PATCHED = ("forward", "_get_name")


@dataclass(frozen=True)
class Kernels:
    """What a model is computed with.

    Attributes:
        attention: of packs: varlen or sdpa.
        liger: norms, rotary embeddings and SwiGLU by liger-kernel, True, or where it has some for the model, "auto".
        compiled: layers by torch.compile.
    """

    attention: str
    liger: bool | Literal["auto"]
    compiled: bool

    @staticmethod
    def of(config: Config, engine: str, device: torch.device, dtype: torch.dtype) -> Kernels:
        """What a config gets on a device.

        Args:
            config: with `auto` where it may be.
            engine: `engine.kind`, chosen.
            device: of the worker.
            dtype: what is computed in.

        Raises:
            UserError: what is asked for by name can't be had.
        """
        where = {
            "device": device.type,
            "engine.kind": engine,
            "model.quantization": config.model.quantization,
        }
        for key, wanted in (
            ("model.liger_kernel", config.model.liger_kernel),
            ("train.torch_compile", config.train.torch_compile),
        ):
            for reason in conflicts({**where, key: str(wanted).lower()}, key):
                raise UserError(f"{key} = true {reason}")
        if config.model.liger_kernel is True and not liger_is_installed():
            raise UserError(
                f"model.liger_kernel = true: liger-kernel {'.'.join(map(str, LIGER_SINCE))} or later is not installed; "
                "pip install liger-kernel, or set auto."
            )
        liger = config.model.liger_kernel
        return Kernels(
            attention=kernel_name(config.model.attention, device.type, dtype),
            liger=liger if liger != "auto" or (device.type == "cuda" and liger_is_installed()) else False,
            compiled=config.train.torch_compile is True,
        )

    def put_into(self, base: PreTrainedModel, layers: tuple[nn.Module, ...]) -> None:
        """Lets a model be computed with them.

        Args:
            base: with an adapter around its parts or without one; weights are not needed.
            layers: of it.

        Raises:
            UserError: liger is asked for by name, and has no kernels for the model.
        """
        if self.liger:
            apply_liger(base)
            if self.liger is True and not _has_liger(base):
                raise UserError(
                    f"model.liger_kernel = true: liger-kernel has no kernels for models of type "
                    f"{base.config.model_type}; set auto or false."
                )
        if self.compiled:
            compile_layers(layers)

    def describe(self, base: PreTrainedModel) -> str:
        """For people, of a model that was built with them."""
        packs = base.config._attn_implementation == PACKED
        used = [f"{self.attention} attention" if packs else "the architecture's own attention"]
        if base._can_set_experts_implementation():
            used.append(f"{base.config._experts_implementation} experts")
        used += ["liger norms and SwiGLU"] if self.liger and _has_liger(base) else []
        used += ["compiled layers"] if self.compiled else []
        return f"kernels: {', '.join(used)}"


def experts_of(wanted: str) -> str:
    """`model.experts_implementation` with `auto` decided.

    Measured on a CPU (float32, hidden size 512, experts of 384, 4 a token, forward and backward): where 32 frozen
    experts get 512 tokens each grouped_mm takes 0.59 CPU seconds to the loop's 0.51, where 64 get 64 each 0.14 to 0.21.
    Where 32 are trained it was 2.5 times as fast, for the loop writes a gradient of all experts for each of them.
    batched_mm, which copies an expert's weights for each of its tokens, took 50 times as long.
    """
    return "grouped_mm" if wanted == "auto" else wanted


def liger_is_installed() -> bool:
    """Whether liger-kernel is there, and new enough."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        return False
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) >= LIGER_SINCE


def apply_liger(model: PreTrainedModel) -> None:
    """Liger's norms, rotary embeddings and SwiGLU in a model that may have no weights yet.

    By liger's own function for the architecture; one that it does not know is left as it is. That function replaces
    names of transformers' module, too, for every model that is made later: those are put back, but for functions, which
    are called by these names, and stay liger's on GPUs. Routed experts stay with `model.experts_implementation`, and
    losses with ours: liger's, where they stay apart, make the logits again in the backward pass.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    code = sys.modules[type(model).__module__]
    before = dict(vars(code))
    experts = [m for m in model.modules() if any(p.ndim == 3 for p in m.parameters(recurse=False))]
    own = [{name: vars(m)[name] for name in _PATCHED if name in vars(m)} for m in experts]
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    for name, value in before.items():
        now = vars(code)[name]
        if now is not value:
            setattr(code, name, value if isinstance(value, type) else _on_gpus(now, value))
    for module, kept in zip(experts, own, strict=True):
        for name in _PATCHED:
            vars(module).pop(name, None)
        vars(module).update(kept)


def _has_liger(model: PreTrainedModel) -> bool:
    return any("_get_name" in vars(module) for module in model.modules())


def _on_gpus(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def either(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if first.is_cuda else plain)(first, *args, **kwargs)

    return either


def compile_layers(layers: tuple[nn.Module, ...]) -> None:
    """Compiles a model's layers one by one, in place: layers that are alike share what is compiled.

    The whole model in one graph would take as many times as long to compile as it has layers, and the loss, whose
    number of targets changes with each batch, would be part of it.
    """
    keep_out_of_graphs()
    for layer in layers:
        layer.compile()
