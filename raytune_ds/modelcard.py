"""The model card of a finished run: README.md of what it saved, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import Config


def model_card(
    config: Config,
    data: str,
    num_examples: int,
    progress: Mapping[str, Any],
    trainable: int,
    lineage: str | None = None,
) -> str:
    """The text of a card.

    Args:
        config: of the run.
        data: the fingerprint of the prepared data.
        num_examples: trained on.
        progress: what the run counted: step, tokens, losses.
        trainable: parameters that were trained.
        lineage: where its settings, or its first steps, come from.
    """
    is_adapter = config.adapter.kind != "none"
    library = "peft" if is_adapter else "transformers"
    head = {
        # The hub refuses a card whose base model it does not have.
        **({"base_model": config.model.name} if _is_of_the_hub(config.model.name) else {}),
        "library_name": library,
        "tags": ["raytune_ds", config.objective.kind, *([config.adapter.kind] if is_adapter else [])],
    }
    return "\n".join(
        (
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {config.run.name or 'A model'}",
            "",
            f"{'An adapter for' if is_adapter else 'All parameters of'} {config.model.name}, fine-tuned "
            f"({config.objective.kind}) with raytune_ds.",
            "",
            "| | |",
            "|---|---|",
            *(
                f"| {name} | {value.replace('|', chr(92) + '|')} |"
                for name, value in _facts(config, data, num_examples, progress, trainable)
            ),
            *([f"| lineage | {lineage} |"] if lineage else []),
            "",
        )
    )


def exported_card(
    card: str,
    library: str,
    title: str,
    facts: Sequence[tuple[str, str]],
    kind: str = "",
) -> str:
    """The card of an export: that of the run, and what has happened since.

    Args:
        card: of the run; may be empty.
        library: which library loads it: peft or transformers.
        title: what the export is, in a sentence.
        facts: name and value of what is worth knowing of it.
        kind: of the adapter that a merged model was made with; as a tag, it would tell of an adapter.
    """
    head, text = _parts(card)
    head["library_name"] = library
    if library != "peft":
        head["tags"] = [tag for tag in head.get("tags") or () if tag not in (kind, "lora", "peft")]
        if "base_model" in head:
            head["base_model_relation"] = "finetune"
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts]
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", text.strip(), ""]
    lines += ["## Export", "", title, "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text; text alone where there are no metadata, or damaged ones."""
    if not card.startswith("---\n") or "\n---\n" not in card:
        return {}, card or "# A model"
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    try:
        values = yaml.safe_load(head)
    except yaml.YAMLError:
        values = None
    return (values if isinstance(values, dict) else {}), text


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _is_of_the_hub(model: str) -> bool:
    return not model.startswith("tiny:") and not Path(model).expanduser().is_dir()


def _facts(
    config: Config, data: str, num_examples: int, progress: Mapping[str, Any], trainable: int
) -> list[tuple[str, str]]:
    train, adapter = config.train, config.adapter
    facts = [
        ("base model", config.model.name),
        (
            "data",
            ", ".join(source.path.rstrip("/").rpartition("/")[2] for source in config.data.sources or ()),
        ),
        ("data fingerprint", data),
        ("examples", f"{num_examples:,}"),
        ("trained parameters", f"{trainable:,}"),
        ("optimizer steps", f"{progress['step']:,}"),
        ("tokens", f"{progress['tokens']:,}"),
        ("global batch", f"{train.global_batch} packs of {config.data.seq_len} tokens"),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}, warm-up {_warmup(config)}"),
        ("AdamW", f"betas {train.adam_beta1:g}, {train.adam_beta2:g}; weight decay {train.weight_decay:g}"),
        ("gradient clipping", f"{train.max_grad_norm:g}"),
        ("seed", str(config.run.seed)),
        ("training loss", _course(progress["first_loss"], progress["last_loss"])),
    ]
    if adapter.kind != "none":
        facts.insert(5, ("adapter", _adapter(adapter)))
    if progress["last_eval_loss"] is not None:
        facts.append(("held-out loss", _course(progress["first_eval_loss"], progress["last_eval_loss"])))
    return facts


def _adapter(adapter: AdapterConfig) -> str:
    """Kind, rank and alpha, and what else is not as usual."""
    if adapter.path is not None:
        return f"that of {adapter.path}, trained on"
    values = adapter.model_dump(mode="json", exclude={"kind"}, exclude_none=True)
    told = {
        key: value
        for key, value in values.items()
        if key in ("r", "alpha", "dropout", "targets")
        or value != type(adapter)().model_dump(mode="json")[key]
    }
    return ", ".join([adapter.kind, *(f"{key} {_plain(value)}" for key, value in told.items())])


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _warmup(config: Config) -> str:
    steps = config.train.warmup_steps
    return f"{config.train.warmup_ratio:g} of the steps" if steps is None else f"{steps} steps"


def _course(first: float | None, last: float | None) -> str:
    # None: the loss of a skipped step, which JSON has no number for.
    return " to ".join("not a number" if loss is None else f"{loss:.4f}" for loss in (first, last))
