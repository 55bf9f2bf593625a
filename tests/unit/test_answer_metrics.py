"""Exact match, F1 and ROUGE by hand, and against their definitions."""

from __future__ import annotations

import collections
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from raytune_ds.evaluation.metrics import exact_match, f1, score, tokens, words


@pytest.mark.parametrize(
    ("expected", "given_answer", "exact", "f"),
    [
        ("twice a day", "Twice the day.", 1, 1),
        ("twice a day", "twice a week", 0, 1 / 2),  # twice; of two tokens each
        ("twice a day", "day, twice", 0, 1),
        ("in the eye", "in the left eye", 0, 4 / 5),  # in, eye; of two and three
        ("x x y", "x", 0, 1 / 2),  # once counts once
        ("yes", "no", 0, 0),
        ("yes", "", 0, 0),
        ("3.5 mg", "35 mg", 1, 1),  # SQuAD drops the dot
        ("每天两次", "每天两次。", 1, 1),
        ("每天两次", "每天三次", 0, 3 / 4),
        ("每天两次", "每天", 0, 4 / 6),
        ("服用 GPU 卡", "服用GPU卡", 1, 1),
        ("水をのむ", "水をかう", 0, 2 / 4),
        ("Café", "café", 1, 1),
        # Nothing is left of them, so they are compared as they stand.
        ("!", "?", 0, 0),
        ("The", "the", 0, 0),
        (" ! ", "!", 1, 1),
    ],
)
def test_exact_match_and_f1_by_hand(expected: str, given_answer: str, exact: float, f: float) -> None:
    assert exact_match(expected, given_answer) == exact
    assert f1(expected, given_answer) == pytest.approx(f)


def squad_tokens(text: str) -> list[str]:
    """As in SQuAD's evaluate-v2.0.py."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(gold: str, answer: str) -> float:
    """As in SQuAD's evaluate-v2.0.py, where both have tokens."""
    gold_tokens, answer_tokens = squad_tokens(gold), squad_tokens(answer)
    same = sum((collections.Counter(gold_tokens) & collections.Counter(answer_tokens)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer_tokens), same / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


PLAIN = st.text(alphabet="abhtne .,!-_'39AT\n", max_size=40)


@settings(max_examples=400, deadline=None)
@given(PLAIN, PLAIN)
def test_plain_english_scores_as_in_squad(expected: str, answer: str) -> None:
    assert tokens(expected) == squad_tokens(expected)
    if squad_tokens(expected) and squad_tokens(answer):
        assert f1(expected, answer) == pytest.approx(squad_f1(expected, answer))
        assert exact_match(expected, answer) == (squad_tokens(expected) == squad_tokens(answer))


@settings(max_examples=200, deadline=None)
@given(PLAIN, PLAIN)
def test_plain_english_has_the_rouge_of_the_package(expected: str, answer: str) -> None:
    names = ["rouge1", "rouge2", "rougeL"]
    theirs = RougeScorer(names).score(expected, answer)
    ours = score(expected, answer)
    assert {name: ours[name] for name in names} == {name: theirs[name].fmeasure for name in names}


def test_rouge_of_chinese_by_hand() -> None:
    scores = score("每天两次", "每天三次")
    assert scores["rouge1"] == pytest.approx(3 / 4)  # 每 天 次
    assert scores["rouge2"] == pytest.approx(1 / 3)  # 每天
    assert scores["rougeL"] == pytest.approx(3 / 4)
    assert RougeScorer(["rouge1"]).score("每天两次", "每天三次")["rouge1"].fmeasure == 0, "why ours is needed"
    assert score("每天两次", "次两天每")["rougeL"] == pytest.approx(1 / 4)


def test_words_of_both_at_once() -> None:
    assert words("两个GPU卡, don't") == ["两", "个", "gpu", "卡", "don", "t"]
    assert words("Жизнь é 3") == ["жизнь", "é", "3"]
