"""The models of the benches: real architectures with random weights, small enough for two cores.

The vocabulary decides what logits cost; ids beyond those of the documents are simply never seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_WIDTHS: dict[str, Any] = {"tie_word_embeddings": False, "max_position_embeddings": 32768, "rope_theta": 1e6}
SMALL: dict[str, Any] = {
    **_WIDTHS,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LARGER: dict[str, Any] = {
    **_WIDTHS,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **SMALL, "vocab_size": 16_384},
    "qwen2-129k": {"model_type": "qwen2", **SMALL, "vocab_size": 129_280},
    "llama": {"model_type": "llama", **SMALL, "vocab_size": 32_000},
    "llama-129k": {"model_type": "llama", **SMALL, "vocab_size": 129_280},
    # Layers as wide as those of DeepSeek-R1-Distill-Qwen-1.5B, but three of its 28.
    "qwen2-wide": {"model_type": "qwen2", **LARGER, "vocab_size": 32_768},
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **SMALL,
        "vocab_size": 32_768,
        "num_key_value_heads": 8,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}


def make(shape: str, folder: Path) -> Path:
    """Writes a model of a key of SHAPES as a Hugging Face directory without a tokenizer, unless it is there."""
    target = folder / shape
    if target.exists():
        return target
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target
