"""What other trainers call our keys, and which key an unknown one may have meant."""

import difflib
from collections.abc import Iterable

from raytune_ds.keys import KEYS

# our keys, the likeliest first: the names that transformers, TRL, LLaMA-Factory, axolotl, Lightning and
# torchtune have for them
_CALLED = {
    "run.name": "exp_name experiment_name run_name",
    "run.storage": "output_dir save_dir storage_path",
    "run.seed": "data_seed random_seed",
    "run.resume": "overwrite_output_dir resume_from_checkpoint",
    "model.name": (
        "base_model checkpoint_dir model_id model_name model_name_or_path model_path "
        "pretrained_model_name_or_path"
    ),
    "model.dtype": "bf16 fp16 precision torch_dtype",
    "model.quantization": "load_in_4bit load_in_8bit quantization_bit",
    "model.attention": "attn_implementation flash_attention flash_attn",
    "model.experts_implementation": "moe_implementation",
    "model.liger_kernel": "enable_liger_kernel liger use_liger use_liger_kernel",
    "adapter.kind": "finetuning_type use_lora use_peft",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.bias": "lora_bias",
    "adapter.targets": "lora_target lora_target_modules target_modules target_parameters",
    "adapter.layers": "layers_to_transform",
    "adapter.use_rslora": "rslora",
    "adapter.use_dora": "dora",
    "adapter.init_lora_weights": "init_lora_method pissa_init",
    "adapter.modules_to_save": "additional_target",
    "adapter.path": "adapter_name_or_path adapter_path",
    "model.add_tokens": "new_tokens resize_vocab",
    "model.add_special_tokens": "additional_special_tokens new_special_tokens special_tokens",
    "objective.kind": "loss_type",
    "data.sources": "data_files data_path dataset dataset_name dataset_path datasets train_data train_file",
    "data.sources.0.format": "dataset_format",
    "data.sources.0.weight": "interleave_probs mix_probs probability probabilities proportion weights",
    "data.sources.0.max_rows": "max_samples max_train_samples num_samples",
    "data.sources.0.subset": "config_name dataset_config dataset_config_name",
    "data.sources.0.split": "dataset_split",
    "data.eval.sources": "eval_dataset validation_file",
    "data.eval.fraction": "eval_fraction test_size val_set_size val_size validation_split",
    "data.seq_len": (
        "block_size context_length cutoff_len max_length max_seq_len max_seq_length model_max_length "
        "sequence_len sequence_length"
    ),
    "data.supervise": "assistant_only_loss completion_only_loss mask_history train_on_inputs",
    "data.thinking": "enable_thinking reasoning think_mode",
    "data.chat_template": "template",
    "train.num_train_epochs": "epochs max_epochs num_epochs",
    "train.max_steps": "max_train_steps num_steps total_steps",
    "train.global_batch train.micro_batch": "batch_size gradient_accumulation_steps",
    "train.global_batch": "global_batch_size train_batch_size",
    "train.micro_batch": "micro_batch_size",
    "train.micro_batch train.global_batch": "per_device_batch_size per_device_train_batch_size",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler",
    "train.warmup_ratio train.warmup_steps": "warmup",
    "train.warmup_steps": "num_warmup_steps",
    "train.weight_decay": "wd",
    "train.adam_beta1": "beta1",
    "train.adam_beta2": "beta2",
    "train.adam_beta1 train.adam_beta2": "betas",
    "train.adam_epsilon": "eps",
    "train.max_grad_norm": "clip_grad_norm grad_clip gradient_clip_val gradient_clipping",
    "train.loss_spike_factor": "check_for_spiky_loss loss_watchdog_threshold outlier_multiplier",
    "train.max_skipped_steps": "loss_watchdog_patience",
    "train.max_skipped_steps train.on_skipped_steps": (
        "check_for_nan_in_grad check_for_nan_in_loss_and_grad terminate_on_nan"
    ),
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.torch_compile": "compile compile_model",
    "train.eval_steps": "eval_interval evals_per_epoch",
    "train.logging_steps": "log_every_n_steps log_interval",
    "engine.kind": "fsdp strategy",
    "engine.config engine.kind": "deepspeed",
    "engine.config": "deepspeed_config ds_config",
    "engine.stage": "zero_stage",
    "engine.offload": "cpu_offload offload_optimizer offload_param",
    "scaling.num_workers": "gpus nproc_per_node num_gpus num_processes world_size",
    "scaling.max_failures": "max_restarts",
    "checkpoint.every_steps": "save_interval save_steps",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.background": "async_save",
    "tracking.to": "logger report_to",
}

ALIASES: dict[str, tuple[str, ...]] = {
    alias: tuple(keys.split()) for keys, aliases in _CALLED.items() for alias in aliases.split()
}

ABSENT = {
    "nvme_path": "DeepSpeed's offload to a disk (nvme) is not supported, for checkpoints can't read what it has "
    "swapped out; offload to host memory (engine.offload, device cpu), or take more workers"
}
"""Settings that others have and we have not: why, and what to do instead."""


def suggestions(key: str) -> list[str]:
    """Up to three existing dotted keys that an unknown one may have meant, the likeliest first."""
    written = key.strip().lstrip("-").replace("-", "_").lower()
    section, _, last = written.rpartition(".")
    if written in KEYS:
        return [written]
    if last in ALIASES:
        return list(ALIASES[last])
    siblings = {_last(name) for name in KEYS if name.rpartition(".")[0] == section}
    if near := close(last, siblings, 0.75):
        return [f"{section}.{near[0]}"]
    lasts = [last] if last in map(_last, KEYS) else close(last, set(map(_last, KEYS)), 0.75)
    names = [name for name in KEYS if _last(name) in lasts[:1]]
    return close(written, names, 0.8)[:1] or names[:3]


def close(word: str, names: Iterable[str], cutoff: float) -> list[str]:
    """Up to three names that look like a word; cutoff is a similarity from 0 to 1."""
    # difflib takes quadratic time, and nobody mistypes a key into 60 letters
    return difflib.get_close_matches(word, sorted(names), 3, cutoff) if len(word) <= 60 else []


def _last(key: str) -> str:
    return key.rpartition(".")[2]
