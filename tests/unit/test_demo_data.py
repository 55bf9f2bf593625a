"""The demo's facts and phrasings keep the promises that make its measurement meaningful."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from raytune_ds.demo import data


def bare(term: str) -> str:
    """The term without case, dots and spaces: `P.O.` and `po` count as one term."""
    return re.sub(r"[.\s]", "", term.casefold())


def duplicates(values: Iterable[str]) -> list[str]:
    """The values that occur more than once."""
    seen: set[str] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def all_facts() -> list[data.Fact]:
    return data.general_facts() + data.prescription_facts()


def questions(rows: Iterable[dict[str, str]]) -> list[str]:
    return [row["instruction"] for row in rows]


def test_counts():
    general, prescription, wording = data.general_facts(), data.prescription_facts(), data.phrasings()
    assert len(general) >= 250
    assert (len(prescription), len(wording.train), len(wording.held_out)) == (60, 10, 3)
    assert len(list(data.general_rows())) == len(general) * 13
    assert len(list(data.domain_rows())) == 600
    assert len(list(data.held_out_rows())) == 180


def test_terms_are_unique_in_the_whole_file():
    assert duplicates(bare(fact.term) for fact in all_facts()) == []


def test_meanings_are_unique_so_no_prescription_meaning_is_general():
    assert duplicates(fact.meaning.casefold() for fact in all_facts()) == []


def test_no_general_row_mentions_a_prescription_fact():
    terms = {bare(fact.term) for fact in data.prescription_facts()}
    meanings = {fact.meaning for fact in data.prescription_facts()}
    assert [fact for fact in data.general_facts() if bare(fact.term) in terms] == []
    answers = {row["output"] for row in data.general_rows()}
    assert [(m, answer) for m in meanings for answer in answers if m in answer] == []


def test_held_out_questions_are_never_trained_on():
    trained = set(questions(data.general_rows())) | set(questions(data.domain_rows()))
    assert trained.isdisjoint(questions(data.held_out_rows()))


def test_questions_are_unique():
    rows = [*data.general_rows(), *data.domain_rows(), *data.held_out_rows()]
    assert duplicates(questions(rows)) == []


def test_held_out_phrasings_are_worded_differently():
    """No held-out phrasing shares half of its words, or its first two, with one that is trained on."""
    wording = data.phrasings()
    for held_out in wording.held_out:
        for trained in wording.train:
            theirs, ours = (re.findall(r"\w+", text.casefold()) for text in (trained, held_out))
            assert theirs[:2] != ours[:2]
            assert len(set(theirs) & set(ours) - {"term"}) < len(set(ours)) / 2


def test_placeholders():
    wording = data.phrasings()
    for phrasing in wording.train + wording.held_out:
        assert re.findall(r"\{.*?\}", phrasing) == ["{term}"]
    assert wording.answer == "{meaning}"


def test_every_fact_is_short_clean_text():
    for fact in all_facts():
        for text in fact:
            assert isinstance(text, str), fact
            assert text == " ".join(text.split()), fact
            assert text.isascii(), fact
            assert "{" not in text, fact
        assert 1 <= len(fact.meaning.split()) <= 6, fact


def test_prescription_answers_have_two_to_six_words():
    assert {len(fact.meaning.split()) for fact in data.prescription_facts()} <= set(range(2, 7))


def test_general_meanings_hold_every_word_of_the_prescription_answers():
    known = {word for fact in data.general_facts() for word in fact.meaning.split()}
    needed = {word for fact in data.prescription_facts() for word in fact.meaning.split()}
    assert needed - known == set()


def test_rows_are_alpaca_style():
    for row in [*data.general_rows(), *data.domain_rows(), *data.held_out_rows()]:
        assert list(row) == ["instruction", "input", "output"]
        assert row["input"] == ""
        assert "{" not in row["instruction"] + row["output"]


def test_a_known_row():
    row = next(iter(data.domain_rows()))
    assert row == {"instruction": "What does b.i.d. mean?", "input": "", "output": "twice a day"}


def test_write_rows(tmp_path):
    path = tmp_path / "new" / "held_out.jsonl"
    assert data.write_rows(data.held_out_rows(), path) == 180
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert written == list(data.held_out_rows())


def test_the_module_imports_without_the_heavy_libraries():
    code = (
        "import sys, raytune_ds.demo.data; "
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_general_fact_is_recalled_in_a_phrasing_that_the_domain_phase_never_sees() -> None:
    rows, facts, held_out = list(data.recall_rows()), data.general_facts(), data.phrasings().held_out
    assert [row["output"] for row in rows] == [fact.meaning for fact in facts]
    assert not set(questions(rows)) & set(questions(data.domain_rows()))
    assert set(questions(rows)) < set(questions(data.general_rows())), "the base has seen them all"
    pairs = zip(questions(rows), facts, strict=True)
    asked = [{q for q in held_out if question == q.format(term=fact.term)} for question, fact in pairs]
    assert all(asked)
    assert set().union(*asked) == set(held_out)
