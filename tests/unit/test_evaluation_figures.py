"""Outcomes to figures, and the figures of lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ds.cli import main
from raytune_ds.evaluation.comparison import Metric, compared, verdict
from raytune_ds.evaluation.harness import Figure, Task
from raytune_ds.evaluation.harness import metrics as task_metrics
from raytune_ds.evaluation.items import BASE, TUNED, Item, Outcome, TokenSequence, from_json, to_json
from raytune_ds.evaluation.losses import losses
from raytune_ds.evaluation.metrics import score
from raytune_ds.evaluation.subject import finished, playing, subjects
from tests.helpers import write_jsonl
from tests.runs import finished_run

pytestmark = pytest.mark.usefixtures("one_thread")


def sequence(*ids: int, supervised: int) -> TokenSequence:
    return TokenSequence(list(ids), [0.0] * (len(ids) - supervised) + [1.0] * supervised)


def outcomes(base: list[float], tuned: list[float], weight: float = 2.0) -> list[dict[str, Outcome]]:
    return [{BASE: Outcome(b, weight), TUNED: Outcome(t, weight)} for b, t in zip(base, tuned, strict=True)]


def test_losses_are_per_token_and_compared_row_by_row() -> None:
    rows = [
        {BASE: Outcome(8.0, 2.0), TUNED: Outcome(4.0, 2.0)},
        {BASE: Outcome(9.0, 3.0), TUNED: Outcome(3.0, 3.0)},
        {BASE: Outcome(1.0, 1.0), TUNED: Outcome(2.0, 1.0)},
    ]
    loss, perplexity = compared(rows, seed=0)
    assert (loss.base, loss.tuned) != (None, None)
    assert loss.base is not None
    assert loss.difference is not None
    assert perplexity.difference is not None
    assert loss.base.value == pytest.approx(18 / 6)
    assert loss.tuned.value == pytest.approx(9 / 6)
    assert loss.difference.value == pytest.approx(-9 / 6)
    assert loss.tuned.n == 3
    e = 2.718281828
    assert perplexity.tuned.value == pytest.approx(e ** (9 / 6))
    assert perplexity.tuned.high == pytest.approx(e**loss.tuned.high)
    assert perplexity.difference.value == pytest.approx(e ** (9 / 6) - e**3)


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


# ---- lm-eval ---------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["evaluate", *argv]) == 2
    return capsys.readouterr().err


def test_a_task_of_lm_eval(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of the user's own on a local file, both sides; the accuracy is that of the log-likelihoods."""
    pytest.importorskip("lm_eval")
    own_run = finished_run(tmp_path, tiny_models["qwen2"], strength=30)  # or both would choose alike
    words = ["A", "B", "C", "D", "E"]
    choices = [[a, b] for a in words for b in words if a < b]
    asked = [{"q": f"How many is {n}?", "choices": pair} for n, pair in enumerate(choices)]
    right = _chosen(own_run, BASE, asked)
    questions = [question | {"gold": gold} for question, gold in zip(asked, right, strict=True)]
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
    assert accuracy["tuned"]["n"] == len(questions)
    assert accuracy["base"]["value"] == 1
    same = sum(a == b for a, b in zip(right, _chosen(own_run, TUNED, asked), strict=True))
    assert accuracy["tuned"]["value"] == same / len(questions)
    assert same < len(questions), "the two sides differ"
    assert accuracy["tuned"]["low"] < accuracy["tuned"]["value"] < accuracy["tuned"]["high"]


def _chosen(run: Path, side: str, questions: list[dict[str, Any]]) -> list[int]:
    """Which choice is the likelier one, by our own losses."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    (subject,) = subjects(str(run), finished(str(run)), with_base=True)
    model, chosen = subject.load(), []
    with playing(model, side):
        for question in questions:
            asked = tokenizer(question["q"], add_special_tokens=False)["input_ids"]
            whole = [
                tokenizer(f"{question['q']} {c}", add_special_tokens=False)["input_ids"]
                for c in question["choices"]
            ]
            found = losses(model, [sequence(*ids, supervised=len(ids) - len(asked)) for ids in whole])
            chosen.append(min(range(2), key=lambda n: found[n][0]))
    return chosen


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
