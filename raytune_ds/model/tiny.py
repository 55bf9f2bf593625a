"""`tiny:` models: a real architecture at toy size, random weights, and a tokenizer trained on the user's own data.

They let the whole product run, and be tested, without a GPU, a token or a network. Each is an ordinary Hugging Face
directory, so everything else in the house treats it as it treats any other model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

VOCABULARY = 4096
CONTEXT = 4096

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOOL_MARKS = [
    f"<｜tool▁{what}▁{where}｜>"
    for what in ("calls", "call", "outputs", "output")
    for where in ("begin", "end")
] + ["<｜tool▁sep｜>"]
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT, *TOOL_MARKS]

# DeepSeek-V3's chat format: turns without separators, tool calls and outputs between marks of their own, and no new
# assistant mark behind tool outputs, because the assistant's turn simply goes on.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') -%}
{{- system -}}
{%- if tools -%}
{{- '\\n\\n' if system else '' -}}
{{- 'You may call these functions:' -}}
{%- for tool in tools -%}{{- '\\n' + (tool.function | default(tool) | tojson) -}}{%- endfor -%}
{%- endif -%}
{%- set ns = namespace(after_tool=false) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set ns.after_tool = false -%}
{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{- '' if ns.after_tool else '<｜Assistant｜>' -}}
{%- set ns.after_tool = false -%}
{{- message.content or '' -}}
{%- if message.tool_calls -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message.tool_calls -%}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n' -}}
{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) -}}
{{- '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message.role == 'tool' -%}
{{- '' if ns.after_tool else '<｜tool▁outputs▁begin｜>' -}}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- set ns.after_tool = true -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.after_tool -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_MLA_MOE: dict[str, Any] = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        **_COMMON,
        **_MLA_MOE,
        "q_lora_rank": None,  # as DeepSeek-V2-Lite
        "topk_method": "greedy",
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **_COMMON,
        **_MLA_MOE,
        "q_lora_rank": 96,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "deepseek-v3.2": {
        "model_type": "deepseek_v32",
        **_COMMON,
        **_MLA_MOE,
        "q_lora_rank": 96,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "index_topk": 64,
        "index_n_heads": 4,
        "index_head_dim": 32,
    },
    "deepseek-v4": {
        "model_type": "deepseek_v4",
        **_COMMON,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 96,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 96,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "sliding_window": 32,
        "index_topk": 16,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "qk_rope_head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "qwen2": {"model_type": "qwen2", **_COMMON, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **_COMMON, "num_key_value_heads": 2, "head_dim": 32},
    "llama": {"model_type": "llama", **_COMMON, "num_key_value_heads": 2},
}


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with DeepSeek's special tokens and chat format, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        # Bytes leave nothing unknown. But for some architectures transformers would add a token of its own for it, one
        # more than the model has.
        unk_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(architecture: str, texts: Callable[[], Iterable[str]], seed: int, target: Path) -> Path:
    """Writes the tiny model as a Hugging Face directory at `target`, unless it is there already.

    Args:
        architecture: a key of ARCHITECTURES.
        texts: gives what its tokenizer is trained on; asked only if the directory has to be made.
        seed: of the random weights.
        target: appears whole or not at all, so that two jobs may ask for it at once.
    """
    if target.exists():
        return target
    tokenizer = train_tokenizer(texts())
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKEN_IDS.items()}
    config = AutoConfig.for_model(**ARCHITECTURES[architecture] | ids, vocab_size=len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**ids)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    scratch.chmod(0o755)  # mkdtemp lets nobody else in
    # Not save_pretrained, which imports DeepSpeed, if it is installed, to see whether the model is one of its own.
    entries = revert_weight_conversion(model, model.state_dict())
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in entries.items()},
        scratch / "model.safetensors",
        {"format": "pt"},
    )
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(scratch)
    model.generation_config.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another job was faster, with the same content
        shutil.rmtree(scratch)
    return target


_TOKEN_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
