"""Hugging Face models from a directory or the hub, and what can be known of one before it is loaded."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from raytune_ds import hub
from raytune_ds.config import ModelConfig
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError, first_line
from raytune_ds.model import attention, quantize, weights

# What `PackedLM`, which makes logits itself, leaves out.
UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Attention that is more than causal; of layer_types anything but full attention, such as DeepSeek-V3.2's and V4's.
_MORE_THAN_CAUSAL = ("attn_logit_softcapping", "sliding_window", "index_topk", "attention_chunk_size")
# Names for the error message of one that does not exist: tutorials are full of invented ones.
DEEPSEEK_MODELS = (
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek-ai/DeepSeek-V2",
    "deepseek-ai/DeepSeek-V2-Chat",
    "deepseek-ai/DeepSeek-V2.5",
    "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3-Base",
    "deepseek-ai/DeepSeek-V3-0324",
    "deepseek-ai/DeepSeek-V3.1",
    "deepseek-ai/DeepSeek-V3.1-Base",
    "deepseek-ai/DeepSeek-R1",
    "deepseek-ai/DeepSeek-R1-Zero",
    "deepseek-ai/DeepSeek-R1-0528",
    "deepseek-ai/deepseek-llm-7b-base",
    "deepseek-ai/deepseek-llm-7b-chat",
    "deepseek-ai/deepseek-llm-67b-base",
    "deepseek-ai/deepseek-llm-67b-chat",
    "deepseek-ai/deepseek-moe-16b-base",
    "deepseek-ai/deepseek-moe-16b-chat",
    "deepseek-ai/deepseek-math-7b-instruct",
    "deepseek-ai/deepseek-coder-1.3b-instruct",
    "deepseek-ai/deepseek-coder-6.7b-instruct",
    "deepseek-ai/deepseek-coder-33b-instruct",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
)


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own config, the first thing that fails if a name is wrong.

    Raises:
        UserError: there is no such model, or it can't be read.
    """
    folder = Path(config.name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"model.name = {config.name}: the directory has no config.json, so it is no Hugging Face model."
        )
    if not folder.is_dir() and (config.name.count("/") != 1 or config.name[0] in "./~"):
        raise UserError(f"model.name = {config.name}: there is no such directory.")
    how = {"trust_remote_code": config.trust_remote_code}
    try:
        # First what is on this machine: asking the hub in vain takes a minute of retries.
        return AutoConfig.from_pretrained(_place(config), local_files_only=True, **how)
    except (OSError, ValueError, KeyError) as error:
        if folder.is_dir():
            raise UserError(f"model.name = {config.name}: can't be loaded: {first_line(error)}") from error
    try:
        if is_offline_mode():  # its cache may have it
            with contextlib.suppress(OSError):
                return AutoConfig.from_pretrained(config.name, **how)
        hub.check_model(config.name)
        return AutoConfig.from_pretrained(config.name, **how)
    except UserError as error:
        raise UserError(_not_found(config.name, str(error))) from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name = {config.name}: can't be loaded: {first_line(error)}") from error


def load_for_generation(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Path | None = None,
    revision: str | None = None,
) -> Any:
    """The model with attention that has a key/value cache, on `device`; quantized as it was in training.

    Args:
        config: names it.
        dtype: that is computed in.
        device: where it goes.
        adapter: a peft directory, to be put around it.
        revision: the commit of a model of the hub.

    Returns:
        A transformers model, or a peft model around one, in evaluation mode.

    Raises:
        UserError: it can't be loaded, or what quantizes it is not installed.
    """
    if config.quantization != "none":
        return _quantized(config, dtype, device, adapter, revision).eval()
    model = _from_pretrained(
        config,
        dtype=dtype,
        attn_implementation=own_attention(config),
        device_map={"": device},
        **({} if revision is None else {"revision": revision}),
    )
    _grow(model, config)
    return (model if adapter is None else _adapted(model, adapter)).eval()


def _adapted(model: PreTrainedModel, adapter: Path) -> torch.nn.Module:
    from peft import PeftModel

    with standing_in(model):
        return PeftModel.from_pretrained(model, str(adapter))


@contextlib.contextmanager
def standing_in(model: torch.nn.Module) -> Iterator[None]:
    """Parameters on the meta device are stood in for by real ones of a single number each, read as a whole matrix.

    Peft puts an adapter on the device of what it adapts, and one on the meta device has no weights. The parameters are
    the same objects afterwards, and trained where peft wants their stand-ins trained.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    # Float32, whatever they are held in: peft draws adapters in the dtype of what they are put on. Vectors are real:
    # peft copies tuned biases into the model's own.
    stand_ins = {
        id(p): torch.nn.Parameter(
            torch.zeros(p.shape) if p.ndim < 2 else torch.zeros(()).expand(p.shape), requires_grad=False
        )
        for _, _, p in places
    }
    for module, name, parameter in places:
        module._parameters[name] = stand_ins[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            parameter.requires_grad = stand_ins[id(parameter)].requires_grad
            module._parameters[name] = parameter


def _quantized(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, adapter: Path | None, revision: str | None
) -> torch.nn.Module:
    """One parameter is read after the other, so that the model is never there but quantized.

    transformers itself would leave fused routed experts as they are. The adapter comes first, as in training: peft does
    not find all parameters of modules that are quantized.
    """
    base = skeleton(config, own_attention(config)).requires_grad_(False)
    folder = weights.locate(config, revision)
    opened = weights.open_weights(folder, base)
    weights.fill_buffers(base, opened)
    hold_in(base, dtype)
    packings = quantize.packings(base, config.quantization).values()
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    model: torch.nn.Module = base if adapter is None else _adapted(base, adapter)
    originals = {name: names[id(p)] for name, p in model.named_parameters() if id(p) in names}
    read = quantize.PackedWeights(
        lambda name, start, stop: opened(originals[name], start, stop), quantize.hold(model, packings), device
    )
    for name, parameter in model.named_parameters():
        if quantize.plain_name(name) in originals:
            value = read(name, 0, parameter.numel()).view(parameter.shape).to(device, parameter.dtype)
        else:
            value = parameter.detach().to(device)
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=False))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if adapter is not None:
        _take_tuned_biases(model, adapter)
    return model


def _take_tuned_biases(model: torch.nn.Module, adapter: Path) -> None:
    """Biases that were tuned are parameters of the base model, and were read from its files."""
    from peft import load_peft_weights

    own = dict(model.named_parameters())
    for name, value in load_peft_weights(str(adapter), device="cpu").items():
        for spelled in (name, name.removesuffix(".bias") + ".base_layer.bias"):
            if name.endswith(".bias") and spelled in own:
                own[spelled].data.copy_(value)


def skeleton(
    config: ModelConfig, attention: str | None = None, experts: str | None = None
) -> PreTrainedModel:
    """The model without weights: parameters have shapes only (on the meta device, float32), buffers are real.

    Args:
        config: names it.
        attention: the implementation it is built with; None: what transformers takes for it.
        experts: the same of its routed experts, where it has any.

    Raises:
        UserError: there is no such model, or it can't be trained.
    """
    model_config = load_config(config)
    if unsupported := [name for name in UNSUPPORTED if getattr(model_config, name, None)]:
        raise UserError(
            f"model.name = {config.name}: its {', '.join(unsupported)} would be lost in training; models that need it "
            "are not supported."
        )
    _forget_quantization(config, model_config)
    try:
        with _EmptyOnMeta(), init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                model_config,
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
            )
            if experts is not None and model._can_set_experts_implementation():
                model.set_experts_implementation(experts)
    except ValueError as error:
        raise UserError(
            f"model.name = {config.name}: no causal language model: {first_line(error)}"
        ) from error
    _grow(model, config)
    model.tie_weights()  # parameters on the meta device are new objects, each a single one
    for name, buffer in [*model.named_buffers()]:
        if buffer.is_meta:
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, torch.empty_like(buffer, device="cpu"))
    return model


def _grow(model: PreTrainedModel, config: ModelConfig) -> None:
    """Makes room for the tokens that the config adds."""
    if not (config.add_tokens or config.add_special_tokens):
        return
    plain = config.model_copy(update={"add_tokens": (), "add_special_tokens": ()})
    known, needed = (len(load_tokenizer(TokenizerSpec.of(each))) for each in (plain, config))
    grow(model, known, needed)


def grow(model: PreTrainedModel, known: int, needed: int) -> None:
    """Makes room for added tokens, each of which begins as the mean of the others.

    Args:
        model: with or without weights.
        known: tokens before; rows beyond, which many models have to spare, were never trained. It is kept as
            `config.grown_from`.
        needed: tokens with those that are added.
    """
    ends: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    if needed > ends[0].num_embeddings:
        model.resize_token_embeddings(needed, mean_resizing=False)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
    model.config.grown_from = known
    for weight in (end.weight for end in ends):
        if not weight.is_meta:
            weight.data[known:] = weight.data[:known].float().mean(0).to(weight.dtype)


class _EmptyOnMeta(TorchFunctionMode):
    """Memory that nobody has written to yet is not taken: accelerate looks at a parameter only once it is there.

    One layer's experts of DeepSeek-V3 are 28 GiB.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        where = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **where})


def hold_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Declares the parameters of a skeleton to be of `dtype`, but for those that the architecture keeps in float32."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def _forget_quantization(config: ModelConfig, model_config: PretrainedConfig) -> None:
    """Weights are scaled back from FP8 as they are read, so the model is a plain one from here on.

    Raises:
        UserError: it is quantized in another way.
    """
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is None:
        return
    if not weights.is_block_fp8(quantization):
        raise UserError(
            f"model.name = {config.name}: its weights are quantized ({quantization.get('quant_method')}), and only "
            "block-wise FP8, as DeepSeek publishes, can be trained on. Choose the model that it was made from."
        )
    model_config.fp8_block_size = quantization["weight_block_size"]
    del model_config.quantization_config


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`model.dtype` for this hardware: auto is bfloat16 where the hardware computes in it."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def parts(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(token ids to the last hidden state, hidden state to logits)."""
    return model.get_decoder(), model.get_output_embeddings()


def _from_pretrained(config: ModelConfig, **how: Any) -> PreTrainedModel:
    load_config(config)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            _place(config), trust_remote_code=config.trust_remote_code, **how
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.name = {config.name}: can't be loaded: {first_line(error)}") from error
    return model


def runs_on_packs(config: ModelConfig) -> bool:
    """Whether a model's attention is causal attention and no more, so that documents can lie end to end in one row.

    Raises:
        UserError: there is no such model.
    """
    return attends_causally(load_config(config))


def attends_causally(model_config: PretrainedConfig) -> bool:
    """Whether attention is causal attention and no more."""
    kinds = set(getattr(model_config, "layer_types", None) or ())
    more = any(getattr(model_config, name, None) for name in _MORE_THAN_CAUSAL)
    return kinds <= {"full_attention"} and not more


def packed_attention(config: ModelConfig) -> str:
    """The name to build a model with that runs on packs, as `model.attention` says."""
    attention.choose(config.attention)
    return attention.register()


def own_attention(config: ModelConfig) -> str | None:
    """The name to build one with that does not: None leaves it to transformers."""
    # Of its own accord it takes one that leaves capped scores out.
    return "eager" if getattr(load_config(config), "attn_logit_softcapping", None) else None


def _place(config: ModelConfig) -> str:
    folder = Path(config.name).expanduser()
    return str(folder) if folder.is_dir() else config.name


def _not_found(name: str, reason: str) -> str:
    lines = [f"model.name = {name}: no directory here, and of the hub: {reason}"]
    if name.startswith("deepseek-ai/") and name not in DEEPSEEK_MODELS:
        close = difflib.get_close_matches(name, DEEPSEEK_MODELS, 3, cutoff=0.5)
        lines.append("DeepSeek has published no model of that name that we know of. Real ones are:")
        lines += [f"  {real}" for real in dict.fromkeys([*close, *DEEPSEEK_MODELS[1:5]])]
    return "\n".join(lines)
