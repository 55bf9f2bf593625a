"""A finished run without training: an adapter of random weights, or a model, and what lies around it."""

from __future__ import annotations

from pathlib import Path

import torch

from raytune_ds.compose import compose, dump
from raytune_ds.modelcard import model_card


def finished_run(root: Path, base: Path, *overrides: str, strength: float = 1.0) -> Path:
    """A run directory at root/run with config.json and final/.

    Args:
        root: its storage.
        base: the base model; a tiny one of the llama family.
        overrides: of the config; adapter.kind=none makes it a run of all parameters.
        strength: how far the trained model is from its base; 0: not at all.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = compose(
        [], [f"run.storage={root}", "run.name=run", f"model.name={base}", "data.seq_len=128", *overrides]
    )
    run = root / "run"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    if config.adapter.kind == "none":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(strength * 0.01 * torch.randn_like(parameter))
    else:
        settings = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, bias=config.adapter.bias
        )
        model = get_peft_model(model, settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(strength)
                elif parameter.requires_grad and name.endswith("bias"):
                    parameter.add_(strength * torch.randn_like(parameter))
    model.save_pretrained(run / "final")
    AutoTokenizer.from_pretrained(base).save_pretrained(run / "final")
    progress = {
        "step": 3,
        "tokens": 100,
        "first_loss": 2.0,
        "last_loss": 1.0,
        "first_eval_loss": 2.0,
        "last_eval_loss": 1.5,
    }
    (run / "final" / "README.md").write_text(model_card(config, "0123", 10, progress, 1000))
    (run / "config.json").write_text(dump(config))
    return run
