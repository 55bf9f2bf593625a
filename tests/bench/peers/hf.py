"""What the sides of the Hugging Face libraries have in common."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.bench.peers.case import Case
from tests.bench.protocol import Passes

ARGUMENTS: dict[str, Any] = {
    "output_dir": tempfile.mkdtemp(prefix="raytune-bench-"),
    "num_train_epochs": 1000,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
    "train_sampling_strategy": "sequential",
}


def arguments(case: Case, documents: int, batch: int) -> dict[str, Any]:
    """Training arguments with which an epoch is one optimizer step."""
    on_gpu = torch.cuda.is_available()
    return {
        **ARGUMENTS,
        "learning_rate": case.learning_rate,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": -(-documents // batch),
        "use_cpu": not on_gpu,
        "bf16": case.dtype == "bfloat16",
        **case.options.get("arguments", {}),
    }


def load(case: Case) -> Any:
    """The model as the tutorials load it: frozen weights in the compute dtype, trained ones in float32."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    frozen = getattr(torch, case.dtype) if case.lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=frozen, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def tokenizer() -> Any:
    """One that libraries ask for although rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def lora(case: Case) -> Any:
    """The adapter's config; None where all parameters are trained."""
    from peft import LoraConfig

    return case.lora and LoraConfig(r=8, lora_alpha=16, target_modules=case.lora, task_type="CAUSAL_LM")


class Told(TrainerCallback):
    """Makes an epoch whenever the bench wants a pass."""

    def __init__(self, passes: Passes) -> None:
        """Passes, to begin and end."""
        self._passes = passes

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits."""
        self._passes.begin()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tells."""
        losses = [row["loss"] for row in state.log_history if "loss" in row]
        self._passes.end(losses[-1])
