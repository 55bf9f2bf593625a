"""A whole worker on a quantised base: it learns, goes on as if it had not stopped; plain peft loads what it leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ds import catalog, storage
from raytune_ds.assignment import Assignment
from raytune_ds.compose import dump, replaced
from raytune_ds.data.store import Store
from raytune_ds.generate import Generator
from raytune_ds.model.load import load_for_generation
from tests import alone
from tests.alone import STEPS
from tests.helpers import step_losses

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return alone.prepared(tmp_path_factory.mktemp("root"))


def assignment(store: Store, model: Path, name: str, quantization: str = "nf4", **train: Any) -> Assignment:
    made = alone.assignment(
        store, model, str(Path(store.path).parents[1]), name, **{"learning_rate": 3e-3, **train}
    )
    # A rank that gives the 8-bit optimizer matrices large enough for it.
    config = replaced(made.config, model={"quantization": quantization}, adapter={"r": 32, "alpha": 64.0})
    storage.write_bytes(made.run.config, dump(config).encode())
    return replace(made, config=config, model=config.model)


def run(given: Assignment) -> list[tuple[str, dict[str, Any]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    outcome = alone.work(given, lambda *event: events.append(event))
    assert outcome.error is None
    return events


@pytest.mark.parametrize("architecture", ["deepseek-v3", "llama"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_it_learns_and_goes_on_as_if_it_had_not_stopped(
    store: Store, tiny_models: dict[str, Path], architecture: str, optim: str
) -> None:
    model, name = tiny_models[architecture], f"{architecture}-{optim}"
    whole = assignment(store, model, f"{name}-whole", optim=optim)
    run(whole)
    losses = step_losses(whole.run.path)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    cut = assignment(store, model, f"{name}-cut", optim=optim)
    run(cut)
    storage.delete_dir(catalog.directory(cut.run.checkpoints, STEPS))
    storage.delete_dir(cut.run.final)
    events = run(cut)
    assert any("resuming from the checkpoint of step 12" in str(content) for _, content in events)
    assert step_losses(cut.run.path) == losses


def test_final_is_an_adapter_of_the_base_that_it_was_trained_on(
    store: Store, tiny_models: dict[str, Path]
) -> None:
    """Plain peft on plain transformers' NF4 base, and our own loading, compute the same; another base does not."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given = assignment(store, tiny_models["llama"], "final")
    run(given)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tiny_models["llama"],
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    ids = torch.arange(5, 45).view(1, -1)
    with torch.no_grad():
        # Not in evaluation mode, where bitsandbytes takes a CPU kernel that rounds to bfloat16.
        expected = PeftModel.from_pretrained(theirs, given.run.final).train()(input_ids=ids).logits
        found, other = (
            load_for_generation(config, torch.float32, torch.device("cpu"), Path(given.run.final))(
                input_ids=ids
            ).logits
            for config in (given.model, given.model.model_copy(update={"quantization": "none"}))
        )
        answering = Generator.of_run(given.run.path, "cpu").model(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(answering, found)
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)


def test_a_run_does_not_go_on_with_another_base(store: Store, tiny_models: dict[str, Path]) -> None:
    run(assignment(store, tiny_models["llama"], "once", max_steps=4))
    other = assignment(store, tiny_models["llama"], "once", "int8", max_steps=8)
    outcome = alone.work(other, lambda *_: None)
    assert outcome.error is not None
    assert "model.quantization: nf4 then, int8 now" in outcome.error


def test_an_optimizer_may_change_midway(store: Store, tiny_models: dict[str, Path]) -> None:
    run(assignment(store, tiny_models["llama"], "midway", max_steps=8))
    given = assignment(store, tiny_models["llama"], "midway", max_steps=12, optim="adamw_8bit")
    events = run(given)
    assert any("resuming from the checkpoint of step 8" in str(content) for _, content in events)
    assert len(step_losses(given.run.path)) == 12
