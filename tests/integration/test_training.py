"""One run from mixed sources to an adapter that plain peft loads, and what happens when it is run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.errors import UserError
from tests.helpers import Run, metrics, step_losses, write_jsonl

ALPACA = [
    {"instruction": f"Name colour {i}", "input": "", "output": f"colour {i} is {c}"}
    for i, c in enumerate(["red", "green", "blue", "grey"] * 8)
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": f"How warm is it in town {i}?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"town": i}})},
            {"from": "observation", "value": json.dumps({"celsius": 10 + i})},
            {"from": "gpt", "value": f"It is {10 + i} degrees in town {i}."},
        ],
        "tools": json.dumps(
            [{"name": "weather", "description": "the weather", "parameters": {"type": "object"}}]
        ),
    }
    for i in range(16)
]
SETTINGS = (
    "run.name=mixed",
    "data.seq_len=128",
    "data.eval.fraction=0.1",
    "scaling.num_workers=2",
    "train.global_batch=4",
    "train.learning_rate=1e-3",
    "checkpoint.every_steps=3",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in four formats, and the storage of the runs below."""
    folder = tmp_path_factory.mktemp("training")
    write_jsonl(folder / "alpaca.jsonl", ALPACA)
    (folder / "sharegpt.json").write_text(json.dumps(SHAREGPT, indent=1))
    (folder / "raw.txt").write_text(
        "\n".join(f"Line {i} of a text, " + "and more " * (5 * i) for i in range(12))
    )
    (folder / "pairs.csv").write_text(
        "prompt,completion\n" + "".join(f"half of {2 * i}?,it is {i}\n" for i in range(20))
    )
    return folder


def _sources(folder: Path) -> str:
    names = ("alpaca.jsonl", "sharegpt.json", "raw.txt", "pairs.csv")
    return f"data.sources=[{', '.join(str(folder / name) for name in names)}]"


@pytest.fixture(scope="module")
def first(request: pytest.FixtureRequest, shared: Path) -> Any:
    """The first run, without a format key."""
    request.getfixturevalue("ray_session")
    return _launch(shared, "train.num_train_epochs=3", "train.profile=[2,3]")


def _launch(shared: Path, *overrides: str) -> Any:
    from raytune_ds.compose import compose
    from raytune_ds.launch import launch

    settings = [f"run.storage={shared}", _sources(shared), *SETTINGS, *overrides]
    return launch(compose([], settings))


def test_loss_falls_and_the_run_directory_keeps_its_contract(first: Any) -> None:
    """The files and keys that people's scripts rely on."""
    run = Path(first.run)
    losses = step_losses(first.run)
    assert losses[-1] < losses[0] - 0.1
    rows = metrics(first.run)
    step_keys = {
        "step",
        "epoch",
        "loss",
        "weight",
        "tokens",
        "lr",
        "grad_norm",
        "step_time_s",
        "tokens_per_s",
        "data_wait_s",
        "targets",
        "pairs",
        "model_tflops",
    }
    assert all(step_keys | {"world_size"} <= set(row) for row in rows if "loss" in row)
    assert next(row["step"] for row in rows if "eval_loss" in row) == 0, (
        "the base is evaluated before it is trained"
    )
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["progress"]["step"] == len(losses)
    assert len(result["peak_memory_mib"]) == 2
    assert json.loads((run / "config.json").read_text())["run"]["name"] == "mixed"
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == f"step-{len(losses):08d}"
    assert len(list((run / "checkpoints").iterdir())) == 2, "checkpoint.keep"


def test_the_time_of_some_steps_is_explained(first: Any) -> None:
    folder = Path(first.run) / "profile"
    traces = [f"steps-00000002-00000003-rank-{rank}.json.gz" for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == [*traces, "summary.md"]
    assert "CPU, 2 workers; 2 steps." in (folder / "summary.md").read_text()


def test_the_adapter_loads_with_plain_peft(first: Any) -> None:
    """Same logits as our own loading, and not those of the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raytune_ds.generate import Generator

    final = Path(first.run) / "final"
    base_dir = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name colour 3"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        before = base(input_ids=ids).logits.clone()
        theirs = PeftModel.from_pretrained(base, str(final)).eval()(input_ids=ids).logits
        ours = Generator.of_run(first.run, "cpu").model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert (theirs - before).abs().max() > 1e-3


def test_generate_answers_in_batches_as_alone(first: Any) -> None:
    """Left padding changes nothing; streaming gives the same text."""
    from raytune_ds.generate import Generator, Sampling

    generator = Generator.of_run(first.run, "cpu")
    questions = [
        "Name colour 1",
        "half of 14?",
        "How warm is it in town 3, please, and in the town beside it?",
    ]
    conversations = [[{"role": "user", "content": q}] for q in questions]
    sampling = Sampling(max_new_tokens=12)
    together = list(generator.answer(conversations, sampling))
    alone = [next(generator.answer([c], sampling)) for c in conversations]
    pieces: list[str] = []
    generator.stream(conversations[0], sampling, pieces.append)
    assert together == alone
    assert "".join(pieces).strip() == alone[0].strip()


def test_a_second_run_on_top_does_nothing(
    first: Any, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished is finished: no worker starts, no file changes."""
    before = {p: p.stat().st_mtime_ns for p in Path(first.run).rglob("*") if p.is_file()}
    again = _launch(shared, "train.num_train_epochs=3")
    assert again.progress == first.progress
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path(first.run).rglob("*") if p.is_file()} == before


def test_other_settings_are_refused_by_name(first: Any, shared: Path) -> None:
    """Before any worker starts, naming each difference."""
    with pytest.raises(UserError) as caught:
        _launch(shared, "train.num_train_epochs=3", "adapter.r=4", "run.seed=5")
    assert "run.seed: 0 then, 5 now" in str(caught.value)
    assert "adapter.r: 8 then, 4 now" in str(caught.value)
    assert "run.name" in str(caught.value)


def test_resume_rules(first: Any, shared: Path) -> None:
    """run.resume never refuses what is there, must refuses what is not."""
    with pytest.raises(UserError, match=r"run\.resume is never"):
        _launch(shared, "train.num_train_epochs=4", "run.resume=never")
    with pytest.raises(UserError, match=r"run\.resume is must"):
        _launch(shared, "run.name=other", "run.resume=must")


def test_more_epochs_go_on_where_it_stopped(first: Any, shared: Path, run: Run) -> None:
    """With another number of workers too; each step is in metrics.jsonl once."""
    losses_before = step_losses(first.run)
    longer = _launch(shared, "train.num_train_epochs=4", "scaling.num_workers=1")
    losses = step_losses(longer.run)
    assert losses[: len(losses_before)] == losses_before
    assert len(losses) == len(losses_before) * 4 // 3
    assert longer.num_workers == 1
