"""What an adapter does to the logits is measured against the base model itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from raytune_ds.config import ModelConfig
from raytune_ds.logits import closeness_of, compare
from raytune_ds.tuned import load_tuned
from tests.unit.test_merge import IDS, loaded, logits, lora, make_adapter

FLOAT = torch.float32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows", [None, 7], ids=["vocabulary as it was", "vocabulary grown"])
def test_biases_that_were_tuned_are_part_of_the_effect(
    tiny_models: dict[str, Path], tmp_path: Path, rows: int | None
) -> None:
    """Peft leaves them where the adapter is switched off; here nothing else was tuned, but for added tokens."""
    base = tiny_models["qwen2"]
    saved = ["embed_tokens", "lm_head"] if rows else None
    grown = rows and loaded(base).config.vocab_size + rows
    config = lora(["q_proj"], bias="all", modules_to_save=saved)
    adapter = make_adapter(base, config, tmp_path / "adapter", grown)
    tuned = partial(load_tuned, ModelConfig(name=str(base)), None, adapter)
    model = tuned(FLOAT)
    if rows is None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        model.save_pretrained(str(adapter))
    assert isinstance(model, PeftModel)
    expected = logits(model)[0]
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = compare(tmp_path / "merged", tuned, FLOAT, 0, [IDS[0].tolist()], False, FLOAT)
    assert found.is_good
    before = logits(tuned(FLOAT, adapted=False))[0]
    assert before.shape == expected.shape
    vocabulary = loaded(base).config.vocab_size
    assert torch.equal(before[:, :vocabulary], logits(loaded(base))[0])
    wanted = closeness_of(expected, expected, before, FLOAT, FLOAT, False)
    if rows is None:
        assert found.effect == pytest.approx(wanted.effect, rel=1e-3)
    assert found.effect > 1e-2
