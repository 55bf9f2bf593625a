"""What goes with what, and why the rest does not: quantization, engine, adapter, optimizer and device, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

QUANTIZED = frozenset({"nf4", "int8", "int4", "fp8"})
EIGHT_BIT = frozenset({"adamw_8bit", "paged_adamw_8bit"})
PAGED = frozenset({"paged_adamw_8bit"})


@dataclass(frozen=True)
class Rule:
    """What can not be together.

    Attributes:
        values: by key: those that clash with those of the other keys.
        why: and what to do instead.
    """

    values: Mapping[str, frozenset[str]]
    why: str

    def is_broken_by(self, choice: Mapping[str, str]) -> bool:
        """Whether a choice has a clashing value of each key; one that leaves a key open breaks nothing."""
        return all(choice.get(key) in values for key, values in self.values.items())


RULES = (
    Rule(
        {"model.quantization": QUANTIZED, "adapter.kind": frozenset({"none"})},
        "a quantized weight can't be trained itself; take an adapter, or model.quantization=none",
    ),
    Rule(
        {"model.quantization": QUANTIZED, "adapter.init_lora_weights": frozenset({"pissa", "olora"})},
        "what it begins with is taken out of the base before that is quantized, so that final/ would fit no quantized "
        "base that others have; take loftq or default",
    ),
    Rule(
        {
            "adapter.init_lora_weights": frozenset({"loftq"}),
            "model.quantization": frozenset({"none", *QUANTIZED - {"nf4"}}),
        },
        "it makes good what 4-bit NormalFloat loses; take model.quantization=nf4",
    ),
    Rule(
        {"adapter.kind": frozenset({"adalora"}), "engine.kind": frozenset({"fsdp", "zero"})},
        "which ranks are given up is found from whole gradients, and no worker has these; take engine.kind=ddp",
    ),
    Rule(
        {"train.optim": EIGHT_BIT, "engine.kind": frozenset({"zero"})},
        "DeepSpeed keeps the moments itself, in float32; take engine.kind=ddp or fsdp, or train.optim=adamw_torch",
    ),
    Rule(
        {"train.optim": PAGED, "device": frozenset({"cpu"})},
        "memory is paged between a CUDA GPU and its host only; take train.optim=adamw_8bit",
    ),
    Rule(
        {"train.optim": PAGED, "engine.offload": frozenset({"parameters"})},
        "offloaded parameters are updated in host memory already; take train.optim=adamw_8bit",
    ),
    Rule(
        {"train.torch_compile": frozenset({"true"}), "engine.kind": frozenset({"fsdp", "zero"})},
        "sharded parameters are gathered by hooks around each layer, and compiled layers have been tried on whole ones "
        "only; take engine.kind=ddp, or train.torch_compile=auto",
    ),
    Rule(
        {"train.torch_compile": frozenset({"true"}), "model.quantization": QUANTIZED},
        "values are made from bits by other libraries' operators, which have not been tried inside of a graph; take "
        "train.torch_compile=auto",
    ),
    Rule(
        {"model.liger_kernel": frozenset({"true"}), "device": frozenset({"cpu"})},
        "its kernels are written for GPUs; take model.liger_kernel=auto",
    ),
)

ENGINES: Mapping[str, Mapping[str, str]] = {
    "ddp": {"engine.kind": "ddp"},
    "fsdp": {"engine.kind": "fsdp"},
    "fsdp offload=parameters": {"engine.kind": "fsdp", "engine.offload": "parameters"},
    "zero stage=1": {"engine.kind": "zero"},
    "zero stage=2": {"engine.kind": "zero"},
    "zero offload=optimizer": {"engine.kind": "zero", "engine.offload": "optimizer"},
    "zero stage=3": {"engine.kind": "zero"},
    "zero stage=3 offload=parameters": {"engine.kind": "zero", "engine.offload": "parameters"},
}
OTHERS: Mapping[str, Mapping[str, str]] = {
    **{
        f"{name} + adapter": {"model.quantization": name, "adapter.kind": "lora"}
        for name in ("nf4", "int8", "int4", "fp8")
    },
    "quantized, no adapter": {"model.quantization": "nf4", "adapter.kind": "none"},
    "adalora": {"adapter.kind": "adalora"},
    "loftq, not quantized": {"model.quantization": "none", "adapter.init_lora_weights": "loftq"},
    "quantized + pissa, olora": {"model.quantization": "nf4", "adapter.init_lora_weights": "pissa"},
    "adamw_torch": {"train.optim": "adamw_torch"},
    "adamw_8bit": {"train.optim": "adamw_8bit"},
    "paged_adamw_8bit": {"train.optim": "paged_adamw_8bit", "device": "cuda"},
    "the same on CPUs": {"train.optim": "paged_adamw_8bit", "device": "cpu"},
    "torch_compile": {"train.torch_compile": "true"},
    "torch_compile, quantized": {"train.torch_compile": "true", "model.quantization": "nf4"},
    "liger_kernel": {"model.liger_kernel": "true", "device": "cuda"},
    "liger_kernel on CPUs": {"model.liger_kernel": "true", "device": "cpu"},
}


def conflicts(choice: Mapping[str, str], about: str | None = None) -> Iterator[str]:
    """Why a choice can not be, a line each.

    Args:
        choice: values by config key, and the `device`: cpu or cuda; a key may be left open.
        about: a key that the reason has to do with; all by default.
    """
    for rule in RULES:
        if rule.is_broken_by(choice) and (about is None or about in rule.values):
            named = ", ".join(f"{key}={choice[key]}" for key in rule.values if key != about)
            yield f"{named}: {rule.why}" if about is None else f"does not go with {named}: {rule.why}"


def matrix() -> tuple[list[str], list[list[str]], list[str]]:
    """The table for people: its columns, its rows, and notes that its cells number."""
    notes = list(dict.fromkeys(rule.why for rule in RULES))
    rows = []
    for other, of_other in OTHERS.items():
        cells = []
        for of_engine in ENGINES.values():
            broken = [r.why for r in RULES if r.is_broken_by({**of_engine, **of_other})]
            cells.append(", ".join(f"no ({notes.index(why) + 1})" for why in broken) or "yes")
        rows.append([other, *cells])
    return ["", *ENGINES], rows, [f"({number}) {why}" for number, why in enumerate(notes, 1)]
