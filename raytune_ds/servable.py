"""Which adapters vLLM can serve as they are, by their adapter_config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What vLLM takes for max_lora_rank: `possible_max_ranks` of its LoRAConfig.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HELPER = "vllm/lora/peft_helper.py"
_EXPERTS = "vllm-project/vllm pull requests 41384 and 52194"


@dataclass(frozen=True)
class Limit:
    """Something that adapters may have and vLLM can't serve.

    Attributes:
        what: it is, as people call it.
        has: whether an adapter_config.json has it.
        why: what vLLM does with it.
        source: where that is known from.
    """

    what: str
    has: Callable[[Mapping[str, Any]], bool]
    why: str
    source: str


LIMITS = (
    Limit("another kind than LoRA", lambda c: c.get("peft_type") != "LORA", "reads LoRA only", _HELPER),
    Limit("DoRA", lambda c: bool(c.get("use_dora")), "refuses it", _HELPER),
    Limit("modules_to_save", lambda c: bool(c.get("modules_to_save")), "refuses it", _HELPER),
    Limit(
        "biases",
        lambda c: c.get("bias", "none") != "none" or bool(c.get("lora_bias")),
        "refuses them",
        _HELPER,
    ),
    Limit(
        f"a rank above {RANKS[-1]}", lambda c: c.get("r", 0) > RANKS[-1], "refuses it", "vllm/config/lora.py"
    ),
    Limit(
        "rank_pattern or alpha_pattern",
        lambda c: bool(c.get("rank_pattern") or c.get("alpha_pattern")),
        "scales all layers by one alpha and rank, so it would answer wrongly",
        _HELPER,
    ),
    Limit(
        "adapted experts (target_parameters)",
        lambda c: bool(c.get("target_parameters")),
        "leaves them out without a word, or stops at their shapes",
        _EXPERTS,
    ),
    Limit(
        "new or trained tokens (trainable_token_indices)",
        lambda c: bool(c.get("trainable_token_indices")),
        "leaves them out, in all but the newest versions",
        _HELPER,
    ),
    Limit("layer_replication", lambda c: bool(c.get("layer_replication")), "leaves it out", _HELPER),
)


def refusals(adapter: Mapping[str, Any]) -> list[str]:
    """Why vLLM can't serve an adapter, by its adapter_config.json; empty if it can."""
    return [
        f"it has {limit.what}, and vLLM {limit.why} ({limit.source})"
        for limit in LIMITS
        if limit.has(adapter)
    ]
