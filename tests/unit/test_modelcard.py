"""The model card: metadata that the hub can read, and what somebody would ask about the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ds.config import Config
from raytune_ds.modelcard import model_card

PROGRESS = {
    "step": 1234,
    "tokens": 5_678_901,
    "first_loss": 2.34567,
    "last_loss": 1.2,
    "first_eval_loss": None,
    "last_eval_loss": None,
}


def card(progress: dict[str, Any] = PROGRESS, **sections: Any) -> str:
    config = Config(**{"data": {"sources": ["/data/a.jsonl"]}, **sections})
    return model_card(config, "f1ng3r", 4321, progress, 1_000_000)


def head(text: str) -> dict[str, Any]:
    """The metadata, found as the hub finds it."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def facts(text: str) -> dict[str, str]:
    """The table, each row of which has to have two cells."""
    lines = [line for line in body(text).splitlines() if line.startswith("|")]
    assert lines[:2] == ["| | |", "|---|---|"]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    assert {len(row) for row in cells} == {2}
    assert len({name for name, _ in cells}) == len(cells)
    return {name.strip(): value.strip() for name, value in cells}


def test_the_metadata_of_an_adapter() -> None:
    assert head(card(model={"name": "deepseek-ai/DeepSeek-V3"})) == {
        "base_model": "deepseek-ai/DeepSeek-V3",
        "library_name": "peft",
        "tags": ["raytune_ds", "sft", "lora"],
    }


def test_other_kinds_than_lora_are_tagged_as_what_they_are() -> None:
    assert head(card(adapter={"kind": "ia3"}))["tags"] == ["raytune_ds", "sft", "ia3"]


def test_the_metadata_of_a_whole_model() -> None:
    text = card(
        model={"name": "deepseek-ai/DeepSeek-V3"}, adapter={"kind": "none"}, objective={"kind": "pretrain"}
    )
    assert head(text) == {
        "base_model": "deepseek-ai/DeepSeek-V3",
        "library_name": "transformers",
        "tags": ["raytune_ds", "pretrain"],
    }


def test_the_text_says_what_it_is() -> None:
    text = body(card(run={"name": "my-run"}, model={"name": "org/base"}))
    assert text.startswith("\n# my-run\n\nAn adapter for org/base, fine-tuned (sft) with raytune_ds.\n")
    text = body(card(model={"name": "org/base"}, adapter={"kind": "none"}))
    assert text.startswith("\n# A model\n\nAll parameters of org/base, fine-tuned (sft) with raytune_ds.\n")
    assert text.endswith("|\n")


def test_the_facts() -> None:
    text = card(
        run={"seed": 17},
        model={"name": "org/base"},
        adapter={"r": 16, "alpha": 32.0, "dropout": 0.05},
        data={"sources": ["/data/a.jsonl", "s3://bucket/more/", "org/set"], "seq_len": 1024},
        train={"global_batch": 32, "learning_rate": 1e-4, "weight_decay": 0.1, "warmup_ratio": 0.1},
    )
    assert facts(text) == {
        "base model": "org/base",
        "data": "a.jsonl, more, set",
        "data fingerprint": "f1ng3r",
        "examples": "4,321",
        "trained parameters": "1,000,000",
        "adapter": "lora, r 16, alpha 32, dropout 0.05, targets auto",
        "optimizer steps": "1,234",
        "tokens": "5,678,901",
        "global batch": "32 packs of 1024 tokens",
        "learning rate": "0.0001, cosine, warm-up 0.1 of the steps",
        "AdamW": "betas 0.9, 0.999; weight decay 0.1",
        "gradient clipping": "1",
        "seed": "17",
        "training loss": "2.3457 to 1.2000",
    }


def test_facts_that_not_every_run_has() -> None:
    assert "adapter" not in facts(card(adapter={"kind": "none"}))
    assert "held-out loss" not in facts(card())
    measured = PROGRESS | {"first_eval_loss": 2.0, "last_eval_loss": 1.55556}
    assert facts(card(measured))["held-out loss"] == "2.0000 to 1.5556"
    # Zero is a loss, too.
    assert facts(card(measured | {"last_eval_loss": 0.0}))["held-out loss"] == "2.0000 to 0.0000"
    steps = facts(card(train={"warmup_steps": 0, "lr_scheduler_type": "linear"}))["learning rate"]
    assert steps == "0.0002, linear, warm-up 0 steps"


ODD = [
    "org/name: v2",
    "org/a # b",
    "yes",
    "null",
    "1e3",
    "2024-01-01",
    "- item",
    "{a: b}",
    "*alias",
    "!tag",
    "@at",
    "`code`",
    "'quoted'",
    'double "quotes"',
    "back\\slash",
    "---",
    "模型/é",
    " spaces ",
    "long/" + "word " * 100,
    "a|b",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_models_come_through(name: str) -> None:
    text = card(model={"name": name})
    assert head(text) == {"base_model": name, "library_name": "peft", "tags": ["raytune_ds", "sft", "lora"]}
    assert facts(text)["base model"].replace("\\|", "|") == name.strip()
    assert "data fingerprint" in facts(text)


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_data_come_through(name: str) -> None:
    text = card(data={"sources": [{"path": f"/data/{name}"}, {"path": "b.jsonl"}]})
    expected = f"{name.rpartition('/')[2]}, b.jsonl"
    assert facts(text)["data"].replace("\\|", "|") == expected.strip()
    assert head(text)["library_name"] == "peft"


def test_a_base_model_that_the_hub_does_not_have_is_no_metadata(tmp_path: Path) -> None:
    """The hub refuses a card whose base model it does not know."""
    for name in ("tiny:deepseek-v3", str(tmp_path)):
        text = card(model={"name": name})
        assert "base_model" not in head(text)
        assert facts(text)["base model"] == name
