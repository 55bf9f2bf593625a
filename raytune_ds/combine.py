"""Several LoRA adapters of one base model made into one, by peft's `add_weighted_adapter`.

The base model takes no memory: nothing but the adapters is computed with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError, first_line
from raytune_ds.model.load import skeleton
from raytune_ds.wrapped import ADAPTER_FILE, load_adapter, stand_in, vocabulary

COMBINATIONS = (
    "cat",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
)
"""As peft names them."""
ONE_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Those that add up the matrices themselves, so that all adapters need one rank."""


def base_of(adapters: Sequence[Path]) -> str:
    """The base model that all of them name.

    Raises:
        UserError: one is no LoRA adapter, or they name several.
    """
    configs = [_config(folder) for folder in adapters]
    for folder, config in zip(adapters, configs, strict=True):
        if config.get("peft_type") != "LORA":
            raise UserError(
                f"--merge-adapters {folder}: is of type {config.get('peft_type')}; peft combines LoRA adapters alone."
            )
    bases = [str(config.get("base_model_name_or_path")) for config in configs]
    if len(set(bases)) > 1:
        told = "\n".join(f"  {folder}: {base}" for folder, base in zip(adapters, bases, strict=True))
        raise UserError(f"--merge-adapters: the adapters are of different base models:\n{told}")
    return bases[0]


def check(
    adapters: Sequence[Path], combination: str, weights: Sequence[float], density: float | None
) -> None:
    """Whether they can be combined in that way.

    Args:
        adapters: peft directories.
        combination: one of COMBINATIONS.
        weights: one an adapter.
        density: share of values that is kept, by the combinations that prune.

    Raises:
        UserError: they can't, and why.
    """
    if len(weights) != len(adapters):
        raise UserError(
            f"--weights: {len(weights)} numbers for {len(adapters)} adapters; give one for each, in their order."
        )
    prunes = any(word in combination for word in ("ties", "dare", "magnitude"))
    if prunes and density is None:
        raise UserError(
            f"--combination {combination}: needs --density, the share of values to keep, such as 0.5."
        )
    if not prunes and density is not None:
        raise UserError(f"--density: --combination {combination} keeps all values; leave it out.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density {density:g}: is a share, above 0 and at most 1.")
    configs = [_config(folder) for folder in adapters]
    for folder, config in zip(adapters, configs, strict=True):
        for key, what in (
            ("use_dora", "DoRA's magnitudes"),
            ("modules_to_save", "whole modules (modules_to_save)"),
            ("trainable_token_indices", "trained tokens"),
            ("target_parameters", "adapters on parameters (target_parameters), as on routed experts"),
        ):
            if config.get(key):
                raise UserError(f"--merge-adapters {folder}: peft has no way to combine {what}.")
        if config.get("bias", "none") != "none":
            raise UserError(f"--merge-adapters {folder}: peft has no way to combine trained biases.")
    ranks = [max([config["r"], *(config.get("rank_pattern") or {}).values()]) for config in configs]
    if combination in ONE_RANK and len(set(ranks)) > 1:
        raise UserError(
            f"--combination {combination}: adds up the adapters' matrices, so all need one rank, and these have "
            f"{', '.join(map(str, ranks))}. --combination cat takes any ranks and loses nothing."
        )


def combine(
    adapters: Sequence[Path],
    model: ModelConfig,
    combination: str,
    weights: Sequence[float],
    density: float | None,
    seed: int,
    target: Path,
) -> None:
    """Writes the combined adapter as a plain peft directory.

    Args:
        adapters: peft directories.
        model: their base model.
        combination: one of COMBINATIONS.
        weights: one an adapter.
        density: share of values that is kept, by the combinations that prune.
        seed: of what DARE drops.
        target: a folder that is there.

    Raises:
        UserError: `check` finds a reason, or peft does.
    """
    from peft import PeftModel

    check(adapters, combination, weights, density)
    base = skeleton(model)
    if grown := [f for f in adapters if vocabulary(base, f, load_adapter(f / ADAPTER_FILE)) is not None]:
        raise UserError(
            f"--merge-adapters {grown[0]}: has a larger vocabulary than its base model; not combined."
        )
    stand_in(base, {})
    names = [f"adapter{number}" for number in range(len(adapters))]
    try:
        tuner: Any = PeftModel.from_pretrained(base, str(adapters[0]), names[0], torch_device="cpu")
        for name, folder in zip(names[1:], adapters[1:], strict=True):
            tuner.load_adapter(str(folder), name, torch_device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            tuner.base_model.add_weighted_adapter(
                names, list(weights), "combined", combination, density=density
            )
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(f"--combination {combination}: peft refuses: {first_line(error)}") from error
    tuner.save_pretrained(str(target), selected_adapters=["combined"], save_embedding_layers=False)
    for file in (
        target / "combined"
    ).iterdir():  # peft puts all adapters but "default" into folders of their own
        shutil.move(file, target / file.name)
    (target / "combined").rmdir()
    (target / "README.md").unlink(missing_ok=True)  # peft's own card
    saved = load_adapter(target / ADAPTER_FILE)
    if bad := [name for name, tensor in saved.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"--combination {combination}: gives numbers that are not finite ({bad[0]}).")
    if not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name):
        raise UserError(
            f"--combination {combination}: leaves nothing of the adapters; see --weights and --density."
        )


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is no adapter that peft saved: {error}") from error
