"""Many texts at once become the same tokens as one by one, whoever makes them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from raytune_ds.data import bulk
from raytune_ds.data.bulk import BulkTokenizer
from raytune_ds.data.formats import to_example
from raytune_ds.data.template import Encoder
from raytune_ds.demo.data import general_rows
from tests.families import FAMILIES, Tokenizers
from tests.unit.test_template import tokenizers

__all__ = ["tokenizers"]

# How published tokenizers cut a text before they look for pairs in it.
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
CUTS = {
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
    ],
    "qwen2": [rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_ENDS}"],
    "llama3": [rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}"],
}
TEXTS = [f"{row}" for row in general_rows()][:300]
MANY = [f"text {number}, of many" for number in range(100 * bulk._COMPARED)]


def cut_by(cuts: list[str], model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def loaded(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def trained(cuts: list[str], alphabet: bool = True) -> PreTrainedTokenizerFast:
    """One with the tokens of some English, and of every byte."""
    tokenizer = cut_by(cuts, models.BPE())
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=800, initial_alphabet=letters, special_tokens=["<|end|>"], show_progress=False
        ),
    )
    return loaded(tokenizer)


def of_all_pairs(cuts: list[str]) -> PreTrainedTokenizerFast:
    """One with a token for any two bytes, so that its tokens show every place where a text is cut."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(one, other) for one in letters for other in letters]
    tokens = [*letters, *map("".join, pairs)]
    model = models.BPE({token: number for number, token in enumerate(tokens)}, pairs)
    return loaded(cut_by(cuts, model))


def at_once(tokenizer: PreTrainedTokenizerFast) -> BulkTokenizer:
    """One for which the fastest way is worth it."""
    return BulkTokenizer(tokenizer, [], num_chars=bulk._WORTH_IT * len(tokenizer))


def alone(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def characters() -> Iterator[str]:
    """All of Unicode, the unassigned included; of ideographs, Hangul and empty planes a few of each hundred."""
    for code in range(0x80, 0x110000):
        many = 0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD800 or 0x20000 <= code < 0x32400
        empty = code >= 0x32400 and not 0xE0000 <= code < 0xE0200
        if not 0xD800 <= code < 0xE000 and code % (997 if empty else 37 if many else 1) == 0:
            yield chr(code)


def assert_same(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """The fast way makes the same of all texts, but of those that it is known not to, for which it is not taken."""
    one, expected = at_once(tokenizer), alone(tokenizer, texts)
    assert one._fast is not None
    assert one._is_worth_it
    assert sum(map(len, texts)) > bulk._LARGE
    assert one.ids(texts) == expected
    fast = one._fast(texts, False)
    other = [text for text, ids, own in zip(texts, fast, expected, strict=True) if ids != own]
    assert [text for text in other if not bulk._OTHERWISE.search(text)] == []


@pytest.mark.parametrize("family", CUTS)
def test_every_character_as_the_tokenizer_itself(family: str) -> None:
    among_others = [f"a{c} 1{c}{c}b\n {c}.a{c}1 {c}\n'{c}a {c}{c}'s\n" for c in characters()]
    known = [text for text in among_others if bulk._OTHERWISE.search(text)]
    others = [text for text in among_others if not bulk._OTHERWISE.search(text)]
    texts = [*known, *("".join(others[at : at + 32]) for at in range(0, len(others), 32))]
    assert_same(of_all_pairs(CUTS[family]), texts)


@pytest.mark.parametrize("family", CUTS)
def test_any_text_as_the_tokenizer_itself(family: str) -> None:
    chance = random.Random(0)
    parts = [
        *"aZ09 \n\r\t'sSſKé中あ한🙂\u0301\u180e\u200d\ufe0f\u00a0\u3000.,!?<>|{}_-",
        "<|end|>",
        " <think>",
        "don't",
    ]
    texts = ["".join(chance.choices(parts, k=chance.randint(0, 25))) for _ in range(10_000)]
    texts += [" " * 50_000, "a" * 50_000, "\n" * 50_000, "中" * 50_000, "<think>" * 5_000]
    for tokenizer in (trained(CUTS[family]), of_all_pairs(CUTS[family])):
        assert_same(tokenizer, texts)


def test_what_is_around_a_text() -> None:
    """A document's BOS comes from the tokenizer, whichever way is taken."""
    tokenizer = trained(CUTS["qwen2"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|end|> $A", None, [("<|end|>", 0)])
    one = at_once(tokenizer)
    assert one._fast is not None
    for add in (False, True):
        (ids, *_) = one._fast(["a b"], add)
        assert ids == tokenizer("a b", add_special_tokens=add)["input_ids"]
        assert (ids[0] == tokenizer.eos_token_id) == add


class Noted:
    """A way that notes how many texts went it, and gives tokens that nobody else gives."""

    def __init__(self, one: BulkTokenizer, wrong_from: int) -> None:
        self.taken: list[int] = []
        self.wrong_from, self.usual = wrong_from, one._usual
        one.__dict__["_fast"] = self

    def __call__(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        self.taken.append(len(texts))
        right = self.usual(texts, add_special_tokens)
        return [ids if place < self.wrong_from else [*ids, 0] for place, ids in enumerate(right)]


NEVER = 10**9


def test_the_fast_way_is_taken_where_it_is_worth_it() -> None:
    tokenizer = trained(CUTS["qwen2"])
    little = BulkTokenizer(tokenizer, [], num_chars=bulk._WORTH_IT * len(tokenizer) - 1)
    noted = Noted(little, NEVER)
    little.ids(MANY)
    assert noted.taken == []
    much = at_once(tokenizer)
    noted = Noted(much, NEVER)
    much.ids(MANY[:100])
    assert noted.taken == []
    much.ids(MANY)
    much.ids(["long " * bulk._LARGE])
    assert noted.taken == [len(MANY) / bulk._COMPARED, len(MANY), 1, 1]


def test_what_makes_other_tokens_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does so of what is compared, in a batch or when it is tried first."""
    tokenizer = trained(CUTS["qwen2"])
    one = at_once(tokenizer)
    noted = Noted(one, wrong_from=1)
    assert one.ids(MANY) == alone(tokenizer, MANY)
    assert noted.taken == [len(MANY) / bulk._COMPARED]
    assert at_once(tokenizer)._fast is not None
    monkeypatch.setattr(bulk, "_by_fast", lambda fast, texts, add: [[0] for _ in texts])
    assert at_once(tokenizer)._fast is None


def test_what_comes_in_turn_is_compared_in_turn() -> None:
    """Contexts and answers come one after the other."""
    texts = [f"{'context' if number % 2 else 'answer'} {number}" for number in range(len(MANY))]
    taken: list[Sequence[str]] = []
    one = at_once(trained(CUTS["qwen2"]))
    usual = one._usual
    one.__dict__["_fast"] = lambda some, add: taken.append(some) or usual(some, add)
    one.ids(texts)
    compared, _ = taken
    assert {text.split()[0] for text in compared} == {"context", "answer"}


def test_what_is_refused_is_made_by_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning, for want of a wheel, and by a text that its regular expressions can't get through."""
    unknown = {"unk_token": "<unk>", "special_tokens": ["<unk>"]}
    unigram = cut_by([], models.Unigram())
    unigram.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=300, show_progress=False, **unknown)
    )
    without_all_bytes = trained(CUTS["qwen2"], alphabet=False)
    for tokenizer in (loaded(unigram), without_all_bytes):
        assert at_once(tokenizer)._fast is None
        assert at_once(tokenizer).ids(MANY) == alone(tokenizer, MANY)

    def gives_up(*_: Any) -> list[list[int]]:
        raise ValueError("match limit exceeded")

    tokenizer = trained(CUTS["qwen2"])
    one = at_once(tokenizer)
    one.__dict__["_fast"] = gives_up
    assert one.ids(MANY) == alone(tokenizer, MANY)

    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert at_once(tokenizer)._fast is None
    assert at_once(tokenizer).ids(MANY) == alone(tokenizer, MANY)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_has_the_same_tokens_either_way(tokenizers: Tokenizers, family: str) -> None:
    rows = [to_example(row, "alpaca") for row in general_rows()][:2000]
    much, little = (Encoder(tokenizers[family], num_chars=num_chars) for num_chars in (NEVER, 0))
    assert much.literals._bulk._fast is not None
    assert much.encode_all(rows) == little.encode_all(rows)
