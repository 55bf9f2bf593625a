"""The adapter section of the config tree: what is trained, in the terms of peft."""

import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from raytune_ds.section import Count, Section, Setting, Text, about, as_mapping, as_settings

FROM_WEIGHTS = re.compile(r"olora|pissa(_niter_[1-9][0-9]*)?")
"""Values of init_lora_weights that take the adapter out of the base weights, and leave these changed."""
_DRAWN = ("default", "gaussian", "orthogonal", "eva", "loftq")
_OWN_KEYS = {
    "target_modules": "adapter.targets",
    "target_parameters": "adapter.targets",
    "layers_to_transform": "adapter.layers",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "task_type": "objective.kind",
    "peft_type": "adapter.kind",
    "base_model_name_or_path": "model.name",
    "trainable_token_indices": "model.add_tokens",
}
PLANNING, TOTAL_STEPS = ("adalora",), "total_step"
"""Methods that want to know the length of the run, and the option in which peft has them told."""
_OF_LORA = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "loraplus_lr_ratio")


class AdapterConfig(Section):
    """What is trained: a low-rank adapter beside frozen weights, or all parameters."""

    kind: str = Field(
        default="lora",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="lora: a low-rank adapter, which fits where full training does not; none: all parameters are "
        "trained and the other keys of this section have no effect; or another method of peft by its name: adalora, "
        "vera, ia3, loha, lokr, oft, hra, randlora ...",
    )
    r: Count | None = Field(
        default=8,
        description="Rank of the adapter matrices (a number of dimensions). 8 is enough for most "
        "domains; memory and file size grow with it. null: peft's own, where adapter.kind is not lora.",
    )
    alpha: float | None = Field(
        default=16.0,
        gt=0,
        description="Scaling factor: the adapter's output is multiplied by alpha / r. Twice the rank is"
        " the field's habit; with r=8 the factor is 2. null: peft's own, where adapter.kind is not lora.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that an input of the adapter is zeroed in training. 0: a few epochs of"
        " a low-rank adapter seldom need it, and the loss stays reproducible.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="Biases trained along: none, all of the model's, or only those of adapted layers. "
        "none: the base model stays as it was when the adapter is switched off.",
    )
    targets: str | tuple[str, ...] = Field(
        default="auto",
        description="What gets an adapter: attention, mlp, shared-experts, experts (the routed ones), router, "
        "all-linear, all (all but the router), names or ends of names, or a list of these; any other text: a regular "
        "expression for the full name. auto: every linear layer that peft wraps as it is, which is what servers load.",
    )
    layers: tuple[int | tuple[int, int], ...] | None = Field(
        default=None,
        description="Layers that get an adapter, numbers and ranges such as [0, [8, 15]]; both ends count. null: all.",
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by alpha / sqrt(r) instead of alpha / r, so that large ranks learn as fast "
        "(arXiv:2312.03732).",
    )
    use_dora: bool = Field(
        default=False,
        description="Train direction and magnitude of the weights apart (DoRA, arXiv:2402.09353): better at low "
        "ranks, and slower.",
    )
    init_lora_weights: str = Field(
        default="default",
        description="How a LoRA adapter begins. default: A random, B zero, so that nothing changes at first; gaussian, "
        "orthogonal: A drawn otherwise; pissa, pissa_niter_N (a fast decomposition in N iterations), olora: the "
        "principal part of the weights themselves; eva: of the activations on the training data; loftq: what "
        "quantization loses.",
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        gt=0,
        description="LoRA+ (arXiv:2402.12354): the learning rate of the B matrices is this many times that of A. null: "
        "one rate; 16 is the paper's.",
    )
    rank_pattern: tuple[Setting, ...] = Field(
        default=(),
        description="Ranks of some layers, by the end of their name or a regular expression, such as {kv_b_proj: 32}.",
    )
    alpha_pattern: tuple[Setting, ...] = Field(
        default=(), description="Alphas of some layers, as in adapter.rank_pattern."
    )
    modules_to_save: tuple[Text, ...] = Field(
        default=(),
        description="Modules that are trained whole and saved with the adapter, such as [embed_tokens, lm_head].",
    )
    path: Text | None = Field(
        default=None,
        description="An adapter directory that training goes on from, where the workers see it; it says kind, rank and "
        "targets, so the other keys of this section but loraplus_lr_ratio must be left out. null: a new adapter.",
    )
    options: tuple[Setting, ...] = Field(
        default=(),
        description="Further options of the method by peft's names, such as {init_r: 12} for adalora; it checks them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_other_methods_their_ranks(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind", "lora") not in ("lora", "none"):
            return {"r": None, "alpha": None, **given}
        return given

    @field_validator("targets", mode="before")
    @classmethod
    def _targets_name_something(cls, targets: Any) -> Any:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"is no regular expression: {error}; for several names write a list"
                ) from None
        if targets == "" or (isinstance(targets, (list, tuple)) and (not targets or "" in targets)):
            raise ValueError("names no module; write auto, all-linear, a pattern or a list of names")
        return targets

    @field_validator("layers")
    @classmethod
    def _ranges_run_upwards(cls, layers: Any) -> Any:
        for entry in layers or ():
            first, last = (entry, entry) if isinstance(entry, int) else entry
            if not 0 <= first <= last:
                raise ValueError(
                    f"{entry} names no layer; they are counted from 0, and a range is [first, last]"
                )
        return layers

    @field_validator("init_lora_weights")
    @classmethod
    def _init_is_known(cls, init: str) -> str:
        if init not in _DRAWN and not FROM_WEIGHTS.fullmatch(init):
            raise ValueError(f"there is no such beginning; choose one of {', '.join(_DRAWN)}, pissa, olora")
        return init

    @field_validator("rank_pattern", "alpha_pattern", "options", mode="before")
    @classmethod
    def _read_mapping(cls, given: Any) -> Any:
        return as_settings(given, example="{kv_b_proj: 32}")

    @field_serializer("rank_pattern", "alpha_pattern", "options")
    def _write_mapping(self, settings: tuple[Setting, ...]) -> dict[str, Any]:
        return as_mapping(settings)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_give_numbers(
        cls, patterns: tuple[Setting, ...], info: ValidationInfo
    ) -> tuple[Setting, ...]:
        takes = int if info.field_name == "rank_pattern" else (int, float)
        for key, value in as_mapping(patterns).items():
            if isinstance(value, bool) or not isinstance(value, takes) or value <= 0:
                raise ValueError(f"{key}: {value}: takes a {'whole ' * (takes is int)}number above 0")
        return patterns

    @field_validator("options")
    @classmethod
    def _options_have_no_key_of_their_own(cls, options: tuple[Setting, ...]) -> tuple[Setting, ...]:
        names = [setting.key.partition(".")[0] for setting in options]
        ours = {name: _OWN_KEYS.get(name, f"adapter.{name}") for name in names}
        taken = [n for n in names if n in _OWN_KEYS or n in cls.model_fields]
        if taken:
            raise ValueError("; ".join(f"{name}: set {ours[name]} instead" for name in taken))
        return options

    @model_validator(mode="after")
    def _keys_go_with_the_kind(self) -> Self:
        if self.path is not None:
            return self._says_nothing_itself()
        if self.kind == "none":
            return self
        if self.kind == "lora":
            for key in ("r", "alpha"):
                if getattr(self, key) is None:
                    raise about(key, "lora takes a number")
            return self
        for key in (*_OF_LORA, "init_lora_weights"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise about(key, f"has no meaning with adapter.kind={self.kind}; it takes lora")
        return self

    def _says_nothing_itself(self) -> Self:
        if self.kind == "none":
            raise about("path", "is an adapter, and adapter.kind=none trains all parameters")
        usual = type(self)(kind=self.kind)
        for key in type(self).model_fields.keys() - {"kind", "path", "loraplus_lr_ratio"}:
            if getattr(self, key) != getattr(usual, key):
                raise about(key, "is said by the adapter at adapter.path; leave it out")
        return self

    @property
    def needs_base_weights(self) -> bool:
        """Whether the adapter is made of the base model's weights, not drawn."""
        return self.use_dora or self.init_lora_weights == "loftq" or self.changes_base

    @property
    def changes_base(self) -> bool:
        """Whether what the adapter begins with is taken out of the base weights."""
        return FROM_WEIGHTS.fullmatch(self.init_lora_weights) is not None
