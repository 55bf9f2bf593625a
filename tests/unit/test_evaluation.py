"""A finished run beside its base: what is measured, and what is left behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_ds.cli import main
from raytune_ds.config import ModelConfig
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.errors import UserError
from raytune_ds.evaluate import Wish, measure
from raytune_ds.evaluation.items import BASE, TUNED, Item, TokenSequence
from raytune_ds.evaluation.losses import losses
from raytune_ds.evaluation.metrics import score
from raytune_ds.evaluation.run import outcomes
from raytune_ds.evaluation.scorer import Scorer, said_to, without_reasoning
from raytune_ds.evaluation.subject import Subject, finished, playing, subjects
from raytune_ds.generate import Generator
from raytune_ds.model import attention, tiny
from raytune_ds.model.load import load_for_generation
from raytune_ds.sampling import Sampling
from tests.helpers import write_jsonl
from tests.runs import finished_run

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"instruction": "How many days has a week?", "output": "Seven"},
    {"instruction": "名词解释：适配器", "output": "一小组可以单独训练的参数"},
    {"instruction": "What does this word mean?", "output": "It means that somebody asked a question."},
]
HERE = Wish(num_workers=0, batch_size=2)


def sequence(*ids: int, supervised: int) -> TokenSequence:
    return TokenSequence(list(ids), [0.0] * (len(ids) - supervised) + [1.0] * supervised)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A finished adapter run; tests that write to it copy it."""
    return finished_run(tmp_path_factory.mktemp("storage"), tiny_models["qwen2"])


@pytest.fixture
def own_run(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return finished_run(tmp_path, tiny_models["qwen2"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


# ---- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_losses_are_those_of_plain_transformers(tiny_models: dict[str, Path], architecture: str) -> None:
    """Packed together, each sequence has the loss that it has alone, and the model is as it was afterwards."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[architecture]).eval()
    before = model.config._attn_implementation
    given = [
        sequence(*range(5, 25), supervised=7),
        sequence(*range(40, 43), supervised=3),  # the first is no target
        TokenSequence([9, 8, 7, 6], [0.0, 0.5, 0.0, 2.0]),
    ]
    found = losses(model, given)
    for (loss, weight), one in zip(found, given, strict=True):
        ids, weights = torch.tensor([one.ids]), torch.tensor(one.weights[1:])
        with torch.no_grad():
            probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = -(probabilities.gather(1, ids[0, 1:, None])[:, 0] * weights).sum()
        assert loss == pytest.approx(float(expected), rel=1e-5)
        assert weight == pytest.approx(float(weights.sum()))
    assert model.config._attn_implementation == before


def test_a_model_that_takes_no_packs_reads_them_one_by_one(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"], attn_implementation="sdpa").eval()
    given = [sequence(*range(5, 25), supervised=7), sequence(*range(40, 43), supervised=2)]
    expected = losses(model, given)
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    assert model.config._attn_implementation != attention.PACKED
    assert losses(model, given) == [pytest.approx(pair, rel=1e-5) for pair in expected]


def test_the_base_is_the_adapter_model_with_its_adapter_off(run: Path, tiny_models: dict[str, Path]) -> None:
    given = [sequence(*range(5, 25), supervised=7)]
    (subject,) = subjects(str(run), finished(str(run)), with_base=True)
    model, plain = subject.load(), AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]).eval()
    measured = {}
    for side in subject.sides:
        with playing(model, side):
            measured[side] = losses(model, given)[0][0]
    assert measured[BASE] == pytest.approx(losses(plain, given)[0][0], rel=1e-6)
    assert abs(measured[TUNED] - measured[BASE]) > 1e-3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_with_tuned_biases_the_base_is_loaded_by_itself(
    tmp_path: Path, tiny_models: dict[str, Path], quantization: str
) -> None:
    """Switching the adapter off would leave the biases."""
    words = ("adapter.bias=lora_only", f"model.quantization={quantization}")
    run = finished_run(tmp_path, tiny_models["qwen2"], *words)
    found = subjects(str(run), finished(str(run)), with_base=True)
    assert [subject.sides for subject in found] == [(TUNED,), (BASE,)]
    given = [sequence(*range(5, 25), supervised=7)]
    config = ModelConfig(name=str(tiny_models["qwen2"]), quantization=quantization)
    plain = load_for_generation(config, torch.float32, torch.device("cpu"))
    assert losses(found[1].load(), given) == losses(plain, given)


def test_a_full_run_loads_its_base_behind_the_tuned_model(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    run = finished_run(tmp_path, tiny_models["qwen2"], "adapter.kind=none")
    found = subjects(str(run), finished(str(run)), with_base=True)
    assert [subject.sides for subject in found] == [(TUNED,), (BASE,)]
    given = [sequence(*range(5, 25), supervised=7)]
    tuned, base = (losses(subject.load(), given)[0][0] for subject in found)
    assert abs(tuned - base) > 1e-3
    assert subjects(str(run), finished(str(run)), with_base=False) == found[:1]


# ---- answers ---------------------------------------------------------------------------------------


def question(prompt: list[int], max_new_tokens: int = 12) -> Item:
    return Item([], prompt, "", max_new_tokens)


def generator_of(folder: Path, ends: tuple[int, ...] = ()) -> Generator:
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    return Generator(model.eval(), tokenizer, ends=ends)


@pytest.mark.parametrize("architecture", ["llama", "deepseek-v4"])
def test_answers_in_a_batch_are_those_of_each_alone(tiny_models: dict[str, Path], architecture: str) -> None:
    generator = generator_of(tiny_models[architecture])
    asked = [
        question(list(range(5, 30))),
        question([7, 8], 5),
        question([*range(50, 60)]),
        question([9, 10], 7),
    ]
    assert said_to(generator, asked) == [said_to(generator, [one])[0] for one in asked]


def test_any_token_can_end_an_answer(tiny_models: dict[str, Path]) -> None:
    generator = generator_of(tiny_models["qwen2"])

    def written(prompt: list[int]) -> list[int]:
        answer = generator.ask(prompt, Sampling(12))
        generator.run([answer])
        return answer.ids

    prompts = ([token, token + 1] for token in range(30, 200))
    prompt, ids = next((p, ids) for p in prompts if len(set(ids := written(p))) > 1)
    place = next(n for n, token in enumerate(ids) if token != ids[0])
    text = generator.tokenizer.decode(ids[:place], skip_special_tokens=True).strip()
    assert said_to(generator_of(tiny_models["qwen2"], (ids[place],)), [question(prompt)]) == [(text, False)]
    assert said_to(generator, [question(prompt)])[0][1], "its length ended it"


def test_the_models_own_generation_config_changes_no_answer(
    tiny_models: dict[str, Path], tmp_path: Path, rows: Path
) -> None:
    """Many models are published with a repetition penalty and sampling; what is measured is greedy."""
    bases = [shutil.copytree(tiny_models["qwen2"], tmp_path / name / "base") for name in ("plain", "penal")]
    GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=2.0).save_pretrained(bases[1])
    told = []
    for base in bases:
        run = finished_run(base.parent, base)
        measure(str(run), replace(HERE, data=(str(rows),)))
        lines = (run / "evaluation" / "answers.jsonl").read_text().splitlines()
        told.append([(row["base"], row["tuned"]) for row in map(json.loads, lines)])
    assert told[0] == told[1]


def test_a_prompt_that_leaves_no_room_is_answered_by_nothing(tiny_models: dict[str, Path]) -> None:
    generator = generator_of(tiny_models["llama"])
    asked = [question([300] * generator.context), question([7, 8])]
    assert said_to(generator, asked) == [("", True), *said_to(generator, asked[1:])]


def test_each_row_has_its_own_outcome(run: Path) -> None:
    """Rows are sorted by length on their way, and come back as they were; whatever is beside them in a batch."""
    spec = TokenizerSpec(str(run / "final"))
    subject = Subject(str(run), (BASE, TUNED))
    items = [
        Item(
            [sequence(*range(5, 5 + n), supervised=n // 2)], list(range(20, 20 + n)) if n % 2 else [], "x", 4
        )
        for n in (6, 9, 4, 15, 5, 12, 7)
    ]
    together = outcomes(subject, spec, [], items, num_workers=0, batch_size=3)
    scorer = Scorer(subject, spec, [])
    for item, found in zip(items, together, strict=True):
        (alone,) = scorer.score([item])
        assert {side: one.answer for side, one in found.items()} == {
            s: one.answer for s, one in alone.items()
        }
        assert found[TUNED].loss == pytest.approx(alone[TUNED].loss, rel=1e-5)
        assert (found[TUNED].answer is None) == (not item.prompt)


def test_reasoning_is_not_compared() -> None:
    assert without_reasoning("because of it</think>\n\nSeven").strip() == "Seven"
    assert without_reasoning("<think>it is</think>Seven") == "Seven"
    assert without_reasoning("Seven") == "Seven"


# ---- all of it -------------------------------------------------------------------------------------


def test_a_run_is_measured_and_leaves_figures_answers_and_a_card(
    own_run: Path, rows: Path, tmp_path: Path
) -> None:
    general = write_jsonl(tmp_path / "general.jsonl", ROWS[:2])
    report = measure(str(own_run), replace(HERE, data=(str(rows),), general=(str(general),)))
    assert [one.name for one in report.measured] == ["rows.jsonl", "general.jsonl"]
    written = json.loads((own_run / "evaluation.json").read_text())
    loss = written["data_sets"]["rows.jsonl"]["metrics"]["loss"]
    assert loss["base"]["n"] == loss["difference"]["n"] == 3
    assert loss["tuned"]["low"] < loss["tuned"]["value"] < loss["tuned"]["high"]
    assert loss["difference"]["value"] == pytest.approx(loss["tuned"]["value"] - loss["base"]["value"])
    assert written["data_sets"]["general.jsonl"]["verdict"].startswith("general.jsonl: ")
    assert written["versions"]["scipy"]
    said = [json.loads(line) for line in (own_run / "evaluation" / "answers.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in said if row["data_set"] == "rows.jsonl"] == [r["output"] for r in ROWS]
    assert said[0]["prompt"] == [{"role": "user", "content": ROWS[0]["instruction"]}]
    assert said[0]["scores"]["tuned"] == score(ROWS[0]["output"], said[0]["tuned"])
    card = (own_run / "final" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    results = {one["dataset"]["name"]: one for one in head["model-index"][0]["results"]}
    figures = {one["type"]: one["value"] for one in results["rows.jsonl"]["metrics"]}
    assert figures["loss"] == pytest.approx(loss["tuned"]["value"], abs=1e-6)
    assert "| base model |" in card, "the rest of the card is as it was"


def test_a_second_evaluation_adds_or_replaces_and_loses_nothing(
    own_run: Path, rows: Path, tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", ROWS[1:])
    measure(str(own_run), replace(HERE, data=(str(rows),), with_base=False))
    card = own_run / "final" / "README.md"
    before = card.read_text().partition("<!-- raytune_ds")[0]
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    measure(str(own_run), replace(HERE, data=(str(other),), limit=1))
    measure(str(own_run), replace(HERE, data=(str(other),)))
    found = json.loads((own_run / "evaluation.json").read_text())["data_sets"]
    assert list(found) == ["rows.jsonl", "other.jsonl"]
    assert found["rows.jsonl"]["metrics"]["loss"]["base"] is None
    assert found["other.jsonl"]["metrics"]["loss"]["base"]["n"] == 2
    said = (own_run / "evaluation" / "answers.jsonl").read_text().splitlines()
    assert len(said) == 5
    text = card.read_text()
    assert text.count("## Evaluation") == text.count("<!-- raytune_ds evaluation -->") == 1
    assert "Written by hand." in text
    assert text.partition("<!-- raytune_ds")[0].split("---")[2] == before.split("---")[2]
    names = [
        one["dataset"]["name"] for one in yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    ]
    assert names == ["rows.jsonl", "other.jsonl"]
    assert text.count("type: exact_match") == 2, "metadata are replaced, too"


def test_two_files_of_one_name_are_told_apart(own_run: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    second = write_jsonl(tmp_path / "b" / "rows.jsonl", ROWS[:1])
    report = measure(str(own_run), replace(HERE, data=(str(rows), str(second)), with_base=False))
    assert [one.name for one in report.measured] == [str(rows), str(second)]


def test_a_model_that_did_not_change_is_neither_better_nor_worse(
    tmp_path: Path, rows: Path, tiny_models: dict[str, Path]
) -> None:
    run = finished_run(tmp_path, tiny_models["qwen2"], strength=0.0)
    report = measure(str(run), replace(HERE, general=(str(rows),)))
    for metric in report.of("rows.jsonl").metrics:
        assert metric.difference is not None
        assert metric.difference.value == pytest.approx(0, abs=1e-6)
        assert not metric.is_worse
        assert not metric.is_better
    assert "no more than noise" in (report.of("rows.jsonl").verdict or "")


# ---- mistakes --------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["evaluate", *argv]) == 2
    return capsys.readouterr().err


def test_mistakes_are_told_in_a_line(
    tmp_path: Path, own_run: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no run directory" in refused(capsys, "--run", str(tmp_path / "nowhere"))
    assert "no such file" in refused(capsys, "--run", str(own_run), "--data", str(tmp_path / "row.jsonl"))
    assert "--data FILE" in refused(capsys, "--run", str(own_run)), "there is nothing to measure it on"
    twice = ("--data", str(rows), "--general", str(rows))
    assert "is named twice" in refused(capsys, "--run", str(own_run), *twice)
    (own_run / "evaluation.json").write_text('{"version": 0, "data_sets": {}}')
    assert "another version" in refused(capsys, "--run", str(own_run), "--data", str(rows))
    (own_run / "evaluation.json").write_text("{")
    assert "is damaged" in refused(capsys, "--run", str(own_run), "--data", str(rows))
    (own_run / "final").rename(tmp_path / "elsewhere")
    assert "has not finished" in refused(capsys, "--run", str(own_run), "--data", str(rows))


def test_a_base_that_is_gone_is_told_of_with_the_way_round(
    tmp_path: Path, rows: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_models["qwen2"], base)
    run = finished_run(tmp_path, base, "adapter.kind=none")
    shutil.rmtree(base)
    how = ("--run", str(run), "--data", str(rows), "--num-workers", "0")
    assert "--no-base" in refused(capsys, *how)
    assert main(["evaluate", *how, "--no-base"]) == 0
    assert "rows.jsonl" in capsys.readouterr().out


def test_tokens_that_the_base_does_not_know(run: Path, tiny_models: dict[str, Path]) -> None:
    scorer = Scorer(Subject(str(run), (TUNED,)), TokenizerSpec(str(run / "final")), [])
    with pytest.raises(UserError, match="--no-base"):
        scorer.score([Item([sequence(1, 99999, supervised=1)])])
