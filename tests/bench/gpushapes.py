"""What the GPU bench computes: the shapes of published models, and documents as long as real ones.

Shapes are those of the models' own config.json. Weights are random, so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raytune_ds.data.packing import first_fit_decreasing

QWEN_1_5B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 131_072,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "vocab_size": 102_400,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHAPES = {"qwen2-1.5b": QWEN_1_5B, "llama-8b": LLAMA_8B, "v2-lite": V2_LITE}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}


def shape(name: str, toy: bool = False) -> dict[str, Any]:
    """A key of SHAPES; `toy`: the same architecture at a size for a CPU."""
    whole = SHAPES[name]
    small = {**whole, **{key: value for key, value in _SMALL.items() if key in whole}}
    if toy and "kv_lora_rank" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small if toy else whole


# Quantiles, equally far apart, of tokens a row: of 999 rows of alpaca_en and 300 of glaive_toolcall_en, by a tokenizer
# of 16,000 tokens trained on them; and the share of a row that is trained on, about.
_ALPACA = "18 28 34 38 43 51 58 77 93 114 133 154 178 204 238 278 304 338 381 418 701"
_GLAIVE = "111 148 164 183 194 227 254 275 293 304 325 364 397 447 512 607 692 776 901 1085 2048"
LENGTHS = {
    "alpaca": [int(tokens) for tokens in _ALPACA.split()],
    "glaive": [int(tokens) for tokens in _GLAIVE.split()],
}
TRAINED_SHARE = 0.6


@dataclass(frozen=True)
class Documents:
    """Token ids, one array a document, and how many at its end are trained on."""

    ids: tuple[np.ndarray, ...]
    answers: tuple[int, ...]

    @staticmethod
    def drawn(lengths: list[int], count: int, vocabulary: int, toy: bool = False) -> Documents:
        """`count` of them, spread evenly over quantiles of lengths, in an order that is always the same."""
        rng = np.random.default_rng(0)
        at = rng.permutation((np.arange(count) + 0.5) / count)
        sizes = np.interp(at, np.linspace(0, 1, len(lengths)), lengths)
        sizes = np.maximum(8, sizes // (8 if toy else 1)).astype(int)
        ids = tuple(rng.integers(3, vocabulary, size) for size in sizes)
        return Documents(ids, tuple(max(1, round(int(size - 1) * TRAINED_SHARE)) for size in sizes))

    @staticmethod
    def long(length: int, count: int, vocabulary: int) -> Documents:
        """`count` of one length, every token of which is trained on."""
        rng = np.random.default_rng(0)
        ids = tuple(rng.integers(3, vocabulary, length + 1) for _ in range(count))
        return Documents(ids, (length,) * count)

    @property
    def tokens(self) -> int:
        """Real tokens that a model runs on, the last of each document being a target only."""
        return sum(len(ids) - 1 for ids in self.ids)

    @property
    def supervised(self) -> int:
        """Targets that are trained on."""
        return sum(self.answers)

    def packs(self, capacity: int) -> list[dict[str, np.ndarray]]:
        """All of them in packs of up to `capacity` tokens, as `collate` takes them."""
        lengths = np.array([len(ids) - 1 for ids in self.ids])
        return [self._pack(members) for members in first_fit_decreasing(lengths, capacity)]

    def _pack(self, members: list[int]) -> dict[str, np.ndarray]:
        weights = [np.arange(len(self.ids[i]) - 1, 0, -1) <= self.answers[i] for i in members]
        return {
            "ids": np.concatenate([self.ids[i][:-1] for i in members]),
            "targets": np.concatenate([self.ids[i][1:] for i in members]),
            "weights": np.concatenate(weights).astype(np.float32),
            "lengths": np.array([len(self.ids[i]) - 1 for i in members]),
            "docs": np.array(members),
        }
