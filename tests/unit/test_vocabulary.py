"""Tokens added to a model: one token each, a row each in embedding and head, and saved so that others load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.check import check
from raytune_ds.compose import compose
from raytune_ds.config import ModelConfig
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.model.build import build
from raytune_ds.model.load import load_for_generation, skeleton
from raytune_ds.model.weights import open_weights
from tests.alone import assignment, prepared, work

ADDED = {"add_tokens": ["<dose>", "glimepiride"], "add_special_tokens": ["<|expert|>"]}
WHOLE = ["embed_tokens", "lm_head"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["deepseek-v3", "qwen2"])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[request.param]


def test_added_tokens_are_one_token_each(model: Path) -> None:
    spec = TokenizerSpec.of(ModelConfig(name=str(model), **ADDED))
    tokenizer, before = load_tokenizer(spec), load_tokenizer(TokenizerSpec(str(model)))
    assert tokenizer("<dose>", add_special_tokens=False)["input_ids"] == [len(before)]
    assert len(before("<dose>", add_special_tokens=False)["input_ids"]) > 1
    assert "<|expert|>" in tokenizer.all_special_tokens
    assert "<dose>" not in tokenizer.all_special_tokens


def test_new_rows_begin_as_the_mean_of_the_others(model: Path) -> None:
    config = ModelConfig(name=str(model), **ADDED)
    plain = AutoModelForCausalLM.from_pretrained(model)
    rows, width = plain.lm_head.weight.shape
    base = skeleton(config)
    weights = open_weights(model, base)
    for name, held in (
        ("model.embed_tokens.weight", plain.model.embed_tokens.weight),
        ("lm_head.weight", plain.lm_head.weight),
    ):
        size = base.get_parameter(name).numel()
        assert size == (rows + 3) * width
        whole = weights(name, 0, size)
        assert torch.equal(whole[: held.numel()], held.detach().reshape(-1))
        torch.testing.assert_close(whole[held.numel() :], held.detach().mean(0).repeat(3))
        for start, stop in (
            (5, size - 7),
            (held.numel() + 3, size - 1),
            (3, held.numel()),
            (held.numel(), size),
        ):
            assert torch.equal(weights(name, start, stop), whole[start:stop])


def test_there_is_room_in_a_padded_vocabulary(model: Path, tmp_path: Path) -> None:
    padded = AutoModelForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(padded.config.vocab_size + 64)
    padded.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path)
    grown = skeleton(ModelConfig(name=str(tmp_path), **ADDED))
    held = padded.get_input_embeddings().weight
    assert grown.get_input_embeddings().weight.shape == held.shape
    # What stands in the spare rows was never trained.
    rows = open_weights(tmp_path, grown)("model.embed_tokens.weight", 0, held.numel()).view(held.shape)
    torch.testing.assert_close(rows[len(tokenizer)], held.detach()[: len(tokenizer)].mean(0))


def test_a_loaded_model_has_the_rows_that_training_began_with(model: Path) -> None:
    config = ModelConfig(name=str(model), **ADDED)
    base = skeleton(config)
    weights = open_weights(model, base)
    for _ in range(2):
        loaded = load_for_generation(config, torch.float32, torch.device("cpu"))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found = loaded.get_parameter(name)
            expected = weights(name, 0, found.numel()).view(found.shape)
            torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("adapter", [{"modules_to_save": WHOLE}, {"kind": "none"}], ids=["adapter", "whole"])
def test_what_is_saved_is_loaded_with_its_tokens(
    model: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    given = assignment(prepared(tmp_path), model, str(tmp_path), "run", adapter, of_model=ADDED)
    said: list[Any] = []
    assert work(given, lambda kind, content: said.append(content)).error is None
    tokenizer = AutoTokenizer.from_pretrained(given.run.final)
    kind = AutoModelForCausalLM if adapter.get("kind") == "none" else AutoPeftModelForCausalLM
    loaded: Any = kind.from_pretrained(given.run.final).eval()
    assert (
        loaded.get_input_embeddings().weight.shape[0]
        == len(tokenizer)
        == len(AutoTokenizer.from_pretrained(model)) + 3
    )
    ids = tokenizer("take <dose> of glimepiride", return_tensors="pt")["input_ids"]
    assert int(ids.max()) >= len(AutoTokenizer.from_pretrained(model))
    logits = loaded(input_ids=ids).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()
    rows = [row["loss"] for row in given.run.read_metrics() if "loss" in row]
    assert rows[-1] < rows[0]


def test_beside_an_adapter_embedding_and_head_are_trained_whole(model: Path, tmp_path: Path) -> None:
    words = [f"model.name={model}", f"run.storage={tmp_path}", "model.add_tokens=[<dose>]"]
    checked = check(compose([], words))
    assert checked.config.adapter.modules_to_save == tuple(WHOLE)
    assert checked.report.whole == tuple(WHOLE)
    made = build(checked.model, checked.config.adapter, 0, torch.float32, torch.float32)
    assert made.trainable == checked.report.trainable


def test_an_embedding_that_is_the_head_too_is_refused(model: Path, tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "tied")
    words = [f"model.name={tmp_path / 'tied'}", f"run.storage={tmp_path}", "model.add_tokens=[<dose>]"]
    with pytest.raises(UserError, match="embedding and output head are one"):
        check(compose([], words))
    assert AdapterConfig().modules_to_save == ()
    assert check(compose([], [*words, "adapter.kind=none"])).report.trainable > 0
