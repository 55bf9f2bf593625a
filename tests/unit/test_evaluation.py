"""A finished run beside its base: what is asked, what is measured, and what is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raytune_ds.cli import main
from raytune_ds.compose import compose
from raytune_ds.data.order import Place
from raytune_ds.errors import UserError
from raytune_ds.evaluate import Wish, measure
from raytune_ds.evaluation.answers import answers, without_reasoning
from raytune_ds.evaluation.comparison import Metric, compared, verdict
from raytune_ds.evaluation.datasets import SPARE_TOKENS, from_file, held_out
from raytune_ds.evaluation.harness import Figure, Task
from raytune_ds.evaluation.harness import metrics as task_metrics
from raytune_ds.evaluation.items import BASE, TUNED, Item, Outcome, TokenSequence, from_json, to_json
from raytune_ds.evaluation.losses import losses
from raytune_ds.evaluation.metrics import score
from raytune_ds.evaluation.subject import Subject, finished, playing, subjects
from raytune_ds.model import attention, tiny
from tests.helpers import write_jsonl
from tests.runs import finished_run
from tests.stores import write_store

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


def read(path: Path, run: Path, *overrides: str, **how: Any) -> Any:
    """The data set of a file, as a run with these settings renders it."""
    from transformers import AutoTokenizer

    config = compose([], ["data.seq_len=128", *overrides])
    told = {"limit": None, "max_new_tokens": None, **how}
    return from_file(str(path), "data", config, AutoTokenizer.from_pretrained(run / "final"), **told)


# ---- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_losses_are_those_of_plain_transformers(tiny_models: dict[str, Path], architecture: str) -> None:
    """Packed together, each sequence has the loss that it has alone, and the model is as it was afterwards."""
    from transformers import AutoModelForCausalLM

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
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"], attn_implementation="sdpa").eval()
    given = [sequence(*range(5, 25), supervised=7), sequence(*range(40, 43), supervised=2)]
    expected = losses(model, given)
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    assert model.config._attn_implementation != attention.PACKED
    assert losses(model, given) == [pytest.approx(pair, rel=1e-5) for pair in expected]


def test_the_base_is_the_adapter_model_with_its_adapter_off(run: Path, tiny_models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    given = [sequence(*range(5, 25), supervised=7)]
    (subject,) = subjects(str(run), finished(str(run)), with_base=True)
    model, plain = subject.load(), AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]).eval()
    measured = {}
    for side in subject.sides:
        with playing(model, side):
            measured[side] = losses(model, given)[0][0]
    assert measured[BASE] == pytest.approx(losses(plain, given)[0][0], rel=1e-6)
    assert abs(measured[TUNED] - measured[BASE]) > 1e-3


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


# ---- answers --------------------------------------------------------------------------------------


def test_answers_in_a_batch_are_those_of_each_alone(run: Path) -> None:
    (subject,) = subjects(str(run), finished(str(run)), with_base=False)
    model = subject.load()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    prompts = [list(range(5, 30)), [7, 8], list(range(50, 60))]
    limits = [12, 5, 12]
    together = answers(model, tokenizer, prompts, [], limits)
    alone = [answers(model, tokenizer, [p], [], [n])[0] for p, n in zip(prompts, limits, strict=True)]
    assert together == alone
    assert all(answer.is_cut_off for answer in together)
    # Any token can be an end: what is said then stops before it.
    with torch.no_grad():
        second = model.generate(input_ids=torch.tensor([prompts[0]]), max_new_tokens=2, do_sample=False)[
            0, -1
        ].item()
    (ended,) = answers(model, tokenizer, prompts[:1], [second], [12])
    assert not ended.is_cut_off
    assert together[0].text.startswith(ended.text)
    assert len(ended.text) < len(together[0].text)


def test_reasoning_is_not_compared() -> None:
    assert without_reasoning("because of it</think>\n\nSeven").strip() == "Seven"
    assert without_reasoning("<think>it is</think>Seven") == "Seven"
    assert without_reasoning("Seven") == "Seven"


# ---- data -----------------------------------------------------------------------------------------


def test_rows_are_rendered_as_in_training(run: Path, rows: Path) -> None:
    from transformers import AutoTokenizer

    data = read(rows, run)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert data.name == "rows.jsonl"
    assert [item.expected for item in data.items] == [row["output"] for row in ROWS]
    for item, row in zip(data.items, ROWS, strict=True):
        messages = [{"role": "user", "content": row["instruction"]}]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert item.prompt == served
        (one,) = item.sequences
        assert one.ids[: len(served)] == served
        assert one.weights == [0.0] * len(served) + [1.0] * (len(one.ids) - len(served))
    longest = max(sum(map(bool, item.sequences[0].weights)) for item in data.items)
    assert {item.max_new_tokens for item in data.items} == {longest + SPARE_TOKENS}
    assert data.ends == {tokenizer.eos_token_id}


def test_formats_and_limits(tmp_path: Path, run: Path) -> None:
    talk = {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "b?"},
            {"role": "assistant", "content": "second"},
        ]
    }
    data = read(write_jsonl(tmp_path / "talk.jsonl", [talk] * 3), run, limit=2)
    assert [item.expected for item in data.items] == ["second"] * 2
    assert sum(map(bool, data.items[0].sequences[0].weights)) > 2, "both answers are in the loss"
    assert data.prompts[0] == tuple(talk["messages"][:3])
    text = tmp_path / "book.txt"
    text.write_text("Once upon a time.\nThe end.\n")
    assert [item.prompt for item in read(text, run).items] == [[], []], "raw text has a loss and no answer"
    judged = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    preferred = read(write_jsonl(tmp_path / "pairs.jsonl", [judged]), run)
    assert [(item.expected, len(item.sequences)) for item in preferred.items] == [("yes", 1)]


def test_a_row_that_cannot_be_rendered_is_told_of_and_left_out(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"instruction": "word " * 300, "output": "never read"}
    data = read(write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], long, ROWS[1]]), run)
    assert [item.expected for item in data.items] == [ROWS[0]["output"], ROWS[1]["output"]]
    assert data.places[1].endswith("row 3, line 3")
    (reason,) = data.unfit
    assert "row 2, line 2" in reason
    assert "data.seq_len = 128" in reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "no row in it"),
        ('{"instruction": "a?"}\n', "the format of the rows is not known"),
        (
            '{"instruction": "a?", "output": "b"}\n{"instruction": "a?"}\n',
            "row 2, line 2: the row has no 'output'",
        ),
        ('{"instruction": "a?", "output": "b"}\nnot json\n', "row 2, line 2: malformed JSON"),
        (json.dumps({"instruction": "word " * 300, "output": "b"}), "no row that can be measured"),
    ],
)
def test_files_that_cannot_be_measured_on(tmp_path: Path, run: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path, run)
    assert "bad.jsonl" in str(caught.value)


def test_bad_rows_are_left_out_where_the_run_left_them_out(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nnot json\n")
    data = read(path, run, "data.on_bad_row=skip")
    assert len(data.items) == 1
    assert "malformed JSON" in data.unfit[0]


def test_the_held_out_split_gives_back_its_documents(tmp_path: Path) -> None:
    """Two packs of documents; those of one row belong together, and their order is the store's."""
    store = write_store(tmp_path, [[2, 0], [1]], [7, 7, 3], [5, 4, 3], ids={0: [1, 2, 3, 4, 5], 2: [6, 7, 8]})
    store = replace(store, manifest=replace(store.manifest, eval=store.manifest.train))
    data = held_out(store, None)
    assert [place.rpartition(", ")[2] for place in data.places] == ["row 4", "row 8"]
    assert data.items[0].sequences == [TokenSequence([6, 7, 8], [0.0, 1.0, 1.0])]
    assert [s.ids for s in data.items[1].sequences] == [[1, 2, 3, 4, 5], [2, 2, 2, 2]]
    assert [place.rpartition(", ")[2] for place in held_out(store, 1).places] == ["row 4"]
    pack = store.reader("train").pack(Place(0, 0))
    assert pack["weights"].sum() == sum(
        sum(s.weights) for s in data.items[0].sequences + data.items[1].sequences[:1]
    )


# ---- figures --------------------------------------------------------------------------------------


def outcomes(base: list[float], tuned: list[float], weight: float = 2.0) -> list[dict[str, Outcome]]:
    return [{BASE: Outcome(b, weight), TUNED: Outcome(t, weight)} for b, t in zip(base, tuned, strict=True)]


def test_losses_are_per_token_and_compared_row_by_row() -> None:
    rows = [
        {BASE: Outcome(8.0, 2.0), TUNED: Outcome(4.0, 2.0)},
        {BASE: Outcome(9.0, 3.0), TUNED: Outcome(3.0, 3.0)},
        {BASE: Outcome(1.0, 1.0), TUNED: Outcome(1.0, 1.0)},
    ]
    loss, perplexity = compared(rows, seed=0)
    assert (loss.base, loss.tuned) != (None, None)
    assert loss.base is not None
    assert loss.difference is not None
    assert perplexity.difference is not None
    assert loss.base.value == pytest.approx(18 / 6)
    assert loss.tuned.value == pytest.approx(8 / 6)
    assert loss.difference.value == pytest.approx(-10 / 6)
    assert loss.tuned.n == 3
    e = 2.718281828
    assert perplexity.tuned.value == pytest.approx(e ** (8 / 6))
    assert perplexity.tuned.high == pytest.approx(e**loss.tuned.high)
    assert perplexity.difference.value == pytest.approx(e ** (8 / 6) - e**3)


def test_answers_are_counted_where_they_were_asked() -> None:
    def said(text: str) -> Outcome:
        return Outcome(1.0, 1.0, text, False, score("yes", text))

    rows = [{BASE: said("no"), TUNED: said("yes")}] * 9 + [
        {BASE: Outcome(1.0, 1.0), TUNED: Outcome(1.0, 1.0)}
    ]
    exact = next(metric for metric in compared(rows, 0) if metric.name == "exact_match")
    assert exact.base is not None
    assert exact.difference is not None
    assert (exact.base.value, exact.tuned.value, exact.difference.value) == (0, 1, 1)
    assert exact.tuned.n == 9
    assert not exact.tuned.overlaps(exact.base)
    assert exact.is_better


def test_what_was_forgotten_is_said() -> None:
    base = [2.0 + 0.01 * (n % 7) for n in range(60)]
    worse = verdict("g", compared(outcomes(base, [b + 0.5 + 0.01 * (n % 5) for n, b in enumerate(base)]), 0))
    same = verdict("g", compared(outcomes(base, [b + 0.3 * (-1) ** n for n, b in enumerate(base)]), 0))
    better = verdict("g", compared(outcomes(base, [b - 0.5 - 0.01 * (n % 5) for n, b in enumerate(base)]), 0))
    assert worse is not None
    assert "worse than its base beyond noise: loss +0.260 [+0.25" in worse
    assert same is not None
    assert "no more than noise" in same
    assert better is not None
    assert "nothing is lost" in better
    assert verdict("g", compared([{TUNED: Outcome(1.0, 1.0)}] * 5, 0)) is None


def test_items_and_outcomes_travel_as_json() -> None:
    item = Item([sequence(1, 2, 3, supervised=2)], [1], "二", 5)
    assert Item.from_json(item.to_json()) == item
    outcome = {TUNED: Outcome(1.5, 2.0, "é", True, {"f1": 0.5})}
    assert from_json(to_json(outcome)) == outcome


# ---- all of it ------------------------------------------------------------------------------------


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


# ---- mistakes -------------------------------------------------------------------------------------


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
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_models["qwen2"], base)
    run = finished_run(tmp_path, base, "adapter.kind=none")
    shutil.rmtree(base)
    how = ("--run", str(run), "--data", str(rows), "--num-workers", "0")
    assert "--no-base" in refused(capsys, *how)
    assert main(["evaluate", *how, "--no-base"]) == 0
    assert "rows.jsonl" in capsys.readouterr().out


def test_tokens_that_the_base_does_not_know(run: Path, tiny_models: dict[str, Path]) -> None:
    from raytune_ds.data.tokenizer import TokenizerSpec
    from raytune_ds.evaluation.scorer import Scorer

    scorer = Scorer(Subject(str(run), (TUNED,)), TokenizerSpec(str(run / "final")), [])
    with pytest.raises(UserError, match="--no-base"):
        scorer.score([Item([sequence(1, 99999, supervised=1)])])


# ---- lm-eval --------------------------------------------------------------------------------------


def test_a_task_of_lm_eval(own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of the user's own on a local file, both sides; the accuracy is that of the log-likelihoods."""
    pytest.importorskip("lm_eval")
    questions = [
        {"q": f"How many is {n}?", "choices": ["Seven", "Eight days"], "gold": n % 2} for n in range(8)
    ]
    write_jsonl(tmp_path / "docs.jsonl", questions)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "days.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "days",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": 1.0},
            }
        )
    )
    assert "knows no such task" in refused(capsys, "--run", str(own_run), "--tasks", "days")
    how = ["--run", str(own_run), "--tasks", "days", "--include-path", str(tasks), "--num-workers", "0"]
    assert main(["evaluate", *how]) == 0
    found = json.loads((own_run / "evaluation.json").read_text())["data_sets"]["days"]
    accuracy = found["metrics"]["acc"]
    assert found["role"] == "task"
    assert found["fingerprint"] == "1.0"
    assert accuracy["tuned"]["n"] == 8
    assert accuracy["tuned"]["value"] == _accuracy(own_run, TUNED, questions)
    assert accuracy["base"]["value"] == _accuracy(own_run, BASE, questions)
    assert accuracy["tuned"]["low"] < accuracy["tuned"]["value"] < accuracy["tuned"]["high"]


def _accuracy(run: Path, side: str, questions: list[dict[str, Any]]) -> float:
    """How often the right choice is the likelier one, by our own losses."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    (subject,) = subjects(str(run), finished(str(run)), with_base=True)
    model, right = subject.load(), 0
    with playing(model, side):
        for question in questions:
            asked = tokenizer(question["q"], add_special_tokens=False)["input_ids"]
            whole = [
                tokenizer(f"{question['q']} {c}", add_special_tokens=False)["input_ids"]
                for c in question["choices"]
            ]
            found = losses(model, [sequence(*ids, supervised=len(ids) - len(asked)) for ids in whole])
            right += question["gold"] == min(range(2), key=lambda n: found[n][0])
    return right / len(questions)


def test_figures_of_lm_eval_by_hand() -> None:
    """The usual root of squares; where all documents are right there is still an interval; none without an error."""

    def metric(base: Figure, tuned: Figure) -> Metric:
        sides = {BASE: {"acc": base}, TUNED: {"acc": tuned}}
        (found,) = task_metrics(Task("days", "1", sides, {"acc": True}))
        return found

    usual = metric(Figure(0.5, 0.03, 200), Figure(0.7, 0.04, 200))
    assert usual.difference is not None
    assert usual.difference.low == pytest.approx(0.2 - 1.96 * 0.05, abs=1e-4)
    assert usual.is_better
    clear = metric(Figure(0.9, 0.1, 10), Figure(1.0, 0.0, 10))
    assert clear.tuned.low < 0.75
    assert not clear.is_better
    assert not metric(Figure(0.1, None, 10), Figure(0.9, None, 10)).is_better
    (less,) = task_metrics(Task("t", "1", {TUNED: {"ppl": Figure(3.0, 0.1, 5)}}, {"ppl": False}))
    assert less.less_is_better
    assert less.difference is None
