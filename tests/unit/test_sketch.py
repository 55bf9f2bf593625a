"""Likeness of texts, and what they are written in, from their characters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ds.data.sketch import ALIKE, MINIMA, Marks, likeness, main_script, scripts_in

WORDS = "river stone cloud lamp bread glass horse paper wheel salt".split()


def sketch_of(text: str) -> np.ndarray:
    return Marks.of([text], [text]).sketches[0]


def shingles(text: str) -> set[str]:
    plain = " ".join(text.lower().split())
    return {plain[i : i + 8] for i in range(max(1, len(plain) - 7))}


def bands(text: str) -> set[int]:
    return set(Marks.of([text], [text]).near[0].tolist())


def test_the_likeness_of_sketches_is_about_that_of_the_shingles() -> None:
    """Over 200 pairs, of which each shares another part."""
    rng = np.random.default_rng(0)
    errors = []
    for pair in range(200):
        words = rng.choice(WORDS, 120).tolist()
        other = [w if rng.random() > pair / 2000 else str(rng.choice(WORDS)) for w in words]
        one, two = " ".join(words), " ".join(other)
        true = len(shingles(one) & shingles(two)) / len(shingles(one) | shingles(two))
        errors.append(likeness(sketch_of(one)[None], sketch_of(two))[0] - true)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 1.2 * 0.5 / MINIMA**0.5  # what counting so many gives at worst


def test_texts_that_are_alike_share_a_band_and_others_do_not() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 100)) + f" {i}" for i in range(100)]
    alike = [text.replace(text.split()[50], "changed", 1) for text in texts]
    found = [bool(bands(one) & bands(two)) for one, two in zip(texts, alike, strict=True)]
    assert np.mean(found) > 0.95
    others = [bands(one) & bands(two) for one in texts[:30] for two in texts[30:60]]
    assert np.mean([bool(shared) for shared in others]) < 0.05  # nearly half of their shingles are the same


@given(st.lists(st.text(max_size=40), max_size=6))
def test_any_text_is_like_itself_and_marked_alone_as_among_others(texts: list[str]) -> None:
    together = Marks.of(texts, texts)
    assert together.sketches.shape == (len(texts), MINIMA)
    for place, text in enumerate(texts):
        alone = Marks.of([text], [text])
        assert together.exact[place] == alone.exact[0]
        assert together.near[place].tolist() == alone.near[0].tolist()
        assert likeness(together.sketches[[place]], alone.sketches[0])[0] == 1 > ALIKE


def test_case_and_white_space_make_no_other_text_but_not_the_same() -> None:
    one, two = "Some  words\n are here", "some words are HERE"
    assert bands(one) == bands(two)
    assert Marks.of([one], [one]).exact[0] != Marks.of([two], [two]).exact[0]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("What is it? 42", "Latin"),
        ("Übermut, naïveté", "Latin"),
        ("今天天气很好 GPT", "Chinese"),
        ("今日はいい天気です", "Japanese"),
        ("오늘 날씨가 좋다", "Korean"),
        ("Сегодня хорошая погода", "Cyrillic"),
        ("الطقس جميل اليوم", "Arabic"),
        ("42 + 1 = 43 😀", ""),
        ("", ""),
    ],
)
def test_what_a_text_is_written_in(text: str, script: str) -> None:
    assert main_script(scripts_in(text)) == script


@given(st.text(st.characters(max_codepoint=0x7F), max_size=40))
def test_the_quick_way_counts_what_the_other_counts(text: str) -> None:
    others = scripts_in(text + "天")
    others -= scripts_in("天")
    assert scripts_in(text) == others
