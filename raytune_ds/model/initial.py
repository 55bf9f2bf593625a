"""What an adapter begins with where it is not drawn: another adapter, the base model's weights, or the training data.

It is made once, by one process, and kept as a peft directory in the run: a run that is resumed elsewhere, on other
hardware, goes on from the same one. A decomposition of the same matrix may differ in its last bits, and what is taken
out of the base weights has to be what the adapter began with.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from raytune_ds import storage
from raytune_ds.adapterconfig import FROM_WEIGHTS, AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.data.batch import Batch
from raytune_ds.errors import UserError
from raytune_ds.model import adapters, quantize
from raytune_ds.model.allocation import kept_ranks
from raytune_ds.model.load import hold_in, load_for_generation, skeleton
from raytune_ds.model.targets import choose, shortest_names
from raytune_ds.model.weights import Read, locate, open_weights

T = TypeVar("T")

_PEFT = "base_model.model."  # before names of the base model
CONFIG, TENSORS, MADE_FOR = "adapter_config.json", "adapter_model.safetensors", "made_for.json"
# The most that EVA sees of the data; it ends by itself when its components no longer turn.
_EVA_BATCHES, _EVA_DOCUMENTS = 32, 8


@dataclass(frozen=True)
class Initial:
    """A beginning.

    Attributes:
        config: of peft.
        tensors: as peft saves them.
    """

    config: Any
    tensors: dict[str, torch.Tensor]

    @staticmethod
    def read(folder: str) -> Initial:
        """From a peft directory.

        Raises:
            UserError: it is none.
        """
        config = read_config(folder)
        try:
            return Initial(config, safetensors.torch.load(storage.read_bytes(f"{folder}/{TENSORS}")))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}/{TENSORS}: can't be read: {error}") from error

    @staticmethod
    def of(ready: Any, state: dict[str, torch.Tensor] | None = None) -> Initial:
        """Of a peft model.

        Args:
            ready: the model.
            state: its trained parameters by name, where they are not those that it holds.
        """
        from peft import get_peft_model_state_dict

        held = {name: value for name, value in ready.state_dict().items() if not value.is_meta}
        trained = _under_all_names(ready, state or {})
        config = ready.peft_config[adapters.NAME]
        if config.peft_type == "ADALORA":
            config.rank_pattern = kept_ranks({n.removeprefix(_PEFT): t for n, t in trained.items()})
        # Peft would otherwise ask the hub whether the vocabulary has grown.
        tensors = get_peft_model_state_dict(
            ready, state_dict={**held, **trained}, save_embedding_layers=False
        )
        return Initial(config, dict(tensors))

    def write(self, folder: str) -> None:
        """As a peft directory; the config comes last."""
        storage.make_dir(folder)
        storage.write_bytes(
            f"{folder}/{TENSORS}", safetensors.torch.save(_apart(self.tensors), {"format": "pt"})
        )
        with tempfile.TemporaryDirectory() as local:
            self.config.save_pretrained(local)
            storage.write_bytes(f"{folder}/{CONFIG}", Path(local, CONFIG).read_bytes())

    def put_into(self, ready: nn.Module) -> None:
        """Gives a peft model these weights.

        Raises:
            UserError: they are of another model or adapter.
        """
        from peft import set_peft_model_state_dict

        for parameter in ready.parameters():
            if (
                parameter.requires_grad
            ):  # those of modules that are trained whole have no memory of their own yet
                parameter.data = parameter.data.contiguous()
        expected = Initial.of(ready).tensors
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        wrong = [n for n, t in expected.items() if shapes.get(n) != tuple(t.shape)] + [
            name for name in shapes if name not in expected
        ]
        if wrong:
            raise UserError(
                f"adapter: its weights do not fit this model: {', '.join(wrong[:3])}; it is of another base model."
            )
        set_peft_model_state_dict(ready, dict(self.tensors))


def _under_all_names(ready: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter that layers share is trained under one name, and saved under all of them."""
    values = {id(p): state[name] for name, p in ready.named_parameters() if name in state}
    names = ready.named_parameters(remove_duplicate=False)
    return {name: values[id(p)] for name, p in names if id(p) in values}


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no memory, as files want them; methods with projections for all layers share these."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return apart


def read_config(folder: str) -> Any:
    """The peft config of an adapter that is there, to train it.

    Raises:
        UserError: there is none.
    """
    from peft import PeftConfig

    try:
        with tempfile.TemporaryDirectory() as local:
            Path(local, CONFIG).write_bytes(storage.read_bytes(f"{folder}/{CONFIG}"))
            config = PeftConfig.from_pretrained(local)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: is no peft adapter that can be read: {error}") from error
    adapters.require_known(str(config.peft_type.value).lower(), f"{folder}: ")
    begins = getattr(config, "init_lora_weights", None)
    if isinstance(begins, str) and FROM_WEIGHTS.fullmatch(begins):
        raise UserError(
            f"{folder}: is relative to a base model of its own, from which {begins} has taken something out; convert "
            "it to plain LoRA first: https://huggingface.co/docs/peft/developer_guides/lora"
        )
    config.inference_mode = False
    return config


def as_plain_lora(trained: Initial, begun: Initial) -> Initial:
    """A LoRA adapter for the base model itself, of one for a base model from which its beginning was taken out.

    W - sB0A0 + sBA = W + s[B, -B0][A; A0]: of twice the rank, as peft converts PiSSA and OLoRA.
    """
    config = copy.copy(trained.config)
    # What is added is scaled by alpha / r, or alpha / sqrt(r); the scale stays.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    tensors = dict(trained.tensors)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, begun.tensors[name]], dim=0)
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, -begun.tensors[name]], dim=1)
    return Initial(config, tensors)


def is_needed(config: AdapterConfig) -> bool:
    """Whether an adapter begins with something that is not drawn."""
    return config.kind != "none" and (
        config.path is not None or config.needs_base_weights or config.init_lora_weights == "eva"
    )


def is_made_for(folder: str, whom: dict[str, Any]) -> bool:
    """Whether a beginning is there, and was made for a run like this."""
    return storage.exists(f"{folder}/{MADE_FOR}") and storage.read_json(f"{folder}/{MADE_FOR}") == whom


def keep(begun: Initial, folder: str, whom: dict[str, Any]) -> None:
    """Writes it, and whom it was made for, by which it is known to be whole."""
    storage.delete_dir(folder)
    begun.write(folder)
    storage.write_json(f"{folder}/{MADE_FOR}", whom)


def adapted(
    model: PreTrainedModel, config: AdapterConfig, trained_dtype: torch.dtype, begun: Initial | None
) -> nn.Module:
    """`adapters.apply`, with an adapter that begins as told.

    Args:
        model: without weights.
        config: what is trained.
        trained_dtype: of that.
        begun: None where the adapter is drawn, by torch's seed as it is.

    Raises:
        UserError: a target matches nothing, or the beginning is of another model.
    """
    ready = adapters.apply(model, config, trained_dtype, made=begun and begun.config)
    if begun is not None:
        begun.put_into(ready)
    return ready


def make(
    model: ModelConfig,
    config: AdapterConfig,
    seed: int,
    revision: str | None,
    batches: Callable[[], Iterable[Batch]],
    dtype: torch.dtype,
    device: torch.device,
) -> Initial:
    """A beginning, made anew.

    Args:
        model: the base model.
        config: says where the adapter comes from.
        seed: of what is drawn beside it.
        revision: the commit of a model of the hub.
        batches: of the training data.
        dtype: that the base model computes in, where it has to.
        device: that it computes on.

    Raises:
        UserError: there is no such adapter, or it can't be made of this model.
    """
    if config.path is not None:
        return Initial.read(storage.absolute(config.path))
    torch.manual_seed(seed)
    if config.init_lora_weights == "eva":
        return _of_data(model, config, batches(), dtype, device)
    base = skeleton(model)
    hold_in(base, dtype)
    weights = open_weights(locate(model, revision), base)
    seen = quantize.dequantised(weights, base, model.quantization, device)
    return _of_weights(base, config, weights, seen, device)


def _of_weights(
    base: PreTrainedModel, config: AdapterConfig, weights: Read, seen: Read, device: torch.device
) -> Initial:
    """By peft's own initialisation of each layer, one layer's weights in memory at a time.

    Args:
        base: without weights.
        config: ours.
        weights: of the base model.
        seen: the same as they are computed with: quantized and made values again, where they are.
        device: does the work.
    """
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    made = adapters.peft_config(base, config, choose(base, config))
    ready = adapters.wrap(base, made)
    for target, layer in _layers(ready):
        inner = layer.get_base_layer()
        held = inner.weight
        name, size = names[id(held)], held.numel()
        value = seen(name, 0, size).view(held.shape).to(device, torch.float32)
        inner.weight = nn.Parameter(value, requires_grad=False)
        layer.update_layer(
            adapters.NAME,
            layer.r[adapters.NAME],
            lora_alpha=layer.lora_alpha[adapters.NAME],
            config=made,
            target_name=target.rpartition(".")[2],
        )
        if config.init_lora_weights == "loftq":
            _make_good(layer, weights(name, 0, size).view(held.shape).to(device, torch.float32) - value)
            if (
                adapters.NAME in layer.lora_variant
            ):  # DoRA's magnitudes are those of base and adapter together
                layer.lora_variant[adapters.NAME].init(layer, adapter_name=adapters.NAME, config=made)
        inner.weight = held
    return _drawn(Initial.of(ready))


def _make_good(layer: Any, lost_OI: torch.Tensor) -> None:
    """LoftQ (arXiv:2310.08659) in one iteration: what quantization loses of a weight, as far as the rank goes.

    Further iterations would quantize another weight than the base's, which no one else has. Peft's own runs on GPUs
    only, and forgets that the adapter is scaled.
    """
    rank = layer.r[adapters.NAME]
    left_OK, values_K, right_KI = torch.linalg.svd(lost_OI, full_matrices=False)
    roots_R = (values_K[:rank] / layer.scaling[adapters.NAME]).sqrt()
    layer.lora_B[adapters.NAME].weight.data = left_OK[:, :rank] * roots_R
    layer.lora_A[adapters.NAME].weight.data = roots_R[:, None] * right_KI[:rank]


def _layers(ready: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in ready.named_modules() if isinstance(module, LoraLayer))


def _of_data(
    model: ModelConfig,
    config: AdapterConfig,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    device: torch.device,
) -> Initial:
    """EVA (arXiv:2410.07170): the principal directions of what comes into each layer, more rank where more of it is.

    The whole base model is in memory for it.
    """
    from peft import get_peft_model
    from peft.tuners.lora import initialize_lora_eva_weights

    plain = skeleton(model)
    made = adapters.peft_config(plain, config, choose(plain, config))
    ready = get_peft_model(load_for_generation(model, dtype, device), made)
    inputs = list(_padded(_documents(batches), device))
    initialize_lora_eva_weights(ready, inputs, gather_distributed_inputs=False, show_progress_bar=False)
    # Layers that were left without a rank are no targets any more; what peft 0.21 writes down may still mean them.
    kept = {name.removeprefix(_PEFT) for name, _ in _layers(ready)}
    made.target_modules = shortest_names(
        kept, {n.removeprefix(_PEFT) for n, _ in ready.named_modules()} - kept
    )
    return _drawn(Initial.of(ready))


def _drawn(made: Initial) -> Initial:
    """As one whose config needs neither weights nor data any more."""
    made.config.init_lora_weights = True
    return Initial(made.config, {n: t.detach().float().cpu().contiguous() for n, t in made.tensors.items()})


def _padded(documents: Iterable[torch.Tensor], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Some documents of the training data side by side, as a transformers model takes them."""
    for several in itertools.islice(_batched(documents, _EVA_DOCUMENTS), _EVA_BATCHES):
        ids_BT = pad_sequence(several, batch_first=True).to(device)
        mask_BT = pad_sequence([torch.ones_like(ids_T) for ids_T in several], batch_first=True).to(device)
        yield {"input_ids": ids_BT, "attention_mask": mask_BT}


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def _documents(batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield from batch.ids_BT[0].split(batch.segments.diff().tolist())
