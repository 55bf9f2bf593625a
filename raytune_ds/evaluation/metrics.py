"""How near an answer comes to the expected one, in English, in Chinese and in both at once.

Exact match and F1 are SQuAD's: both texts in lower case, without punctuation and without the articles a, an and the.
Tokens are what stands between spaces, and each character where a script has no spaces (Chinese, Japanese, Thai ...), as
MLQA has it. Where nothing is left of one of the texts, they count as equal if they are equal as they stand.

ROUGE is that of `rouge_score`, whose own tokenizer drops whatever is not a to z or 0 to 9. Ours makes the same tokens
of plain English, keeps the letters and digits of all scripts, and takes characters for words as F1 does.
"""

from __future__ import annotations

import string
from collections import Counter
from functools import lru_cache
from typing import Any

import regex

ANSWER_METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Of each answer, from 0 to 1."""

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_PUNCTUATION = regex.compile(rf"[\p{{P}}{regex.escape(string.punctuation)}]")
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_CHARACTER_OR_REST = regex.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_CHARACTER_OR_WORD = regex.compile(rf"[{_UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+", regex.V1)


def score(expected: str, given: str) -> dict[str, float]:
    """All of ANSWER_METRICS of one answer."""
    rouge = _rouge().score(expected, given)
    measured = {name: float(value.fmeasure) for name, value in rouge.items()}
    return {"exact_match": exact_match(expected, given), "f1": f1(expected, given), **measured}


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    bare = _PUNCTUATION.sub("", text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def tokens(text: str) -> list[str]:
    """What F1 counts: the normalized text at its spaces, and at each character of a script that has none."""
    return list(_CHARACTER_OR_REST.findall(normalized(text)))


def exact_match(expected: str, given: str) -> float:
    """1 or 0."""
    wanted, said = tokens(expected), tokens(given)
    # "!" and "The" are not the same answer.
    return float(wanted == said if wanted and said else expected.strip() == given.strip())


def f1(expected: str, given: str) -> float:
    """The harmonic mean of how much of the answer is wanted and how much of what is wanted is in it."""
    wanted, said = Counter(tokens(expected)), Counter(tokens(given))
    if not wanted or not said:
        return exact_match(expected, given)
    shared = (wanted & said).total()
    return 2 * shared / (wanted.total() + said.total())


def words(text: str) -> list[str]:
    """What ROUGE counts: runs of letters and digits in lower case, and characters of scripts without spaces."""
    return list(_CHARACTER_OR_WORD.findall(text.lower()))


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
