"""Many texts at once become the same tokens as one by one, whoever makes them."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from raytune_ds.data import bulk
from raytune_ds.data.bulk import BulkTokenizer
from raytune_ds.demo.data import general_rows

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


def trained(cuts: list[str], model: Any = None, trainer: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model or models.BPE())
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainer or trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def at_once(tokenizer: PreTrainedTokenizerFast) -> BulkTokenizer:
    """One that takes the fastest way from the first batch on."""
    one = BulkTokenizer(tokenizer, [])
    one._seen = bulk._WORTH_IT * len(tokenizer)
    return one


def alone(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def every_character() -> list[str]:
    """All that Unicode names, beside letters, digits and spaces; of ideographs and Hangul a few of each hundred."""
    texts, last = [], ""
    for code in range(0x110000):
        character, number = chr(code), code % 256
        kind = unicodedata.category(character)
        if kind in ("Cn", "Cs", "Co") or (kind == "Lo" and code >= 0x3400 and code % 37):
            continue
        last += f"a{character} 1{character}{character}\n"
        if number > 250 or len(last) > 2000:
            texts.append(last)
            last = ""
    return [*texts, last]


@pytest.mark.parametrize("family", CUTS)
def test_every_character_as_the_tokenizer_itself(family: str) -> None:
    tokenizer = trained(CUTS[family])
    one = at_once(tokenizer)
    assert one._fast is not None
    texts = every_character()
    assert one._fast(texts, False) == alone(tokenizer, texts)


@pytest.mark.parametrize("family", CUTS)
def test_any_text_as_the_tokenizer_itself(family: str) -> None:
    tokenizer, chance = trained(CUTS[family]), random.Random(0)
    parts = [
        *"aZ09 \n\r\t'sé中あ한🙂\u0301\u200d\ufe0f\u00a0\u3000.,!?<>|{}_-",
        "<|end|>",
        " <think>",
        "don't",
    ]
    texts = ["".join(chance.choices(parts, k=chance.randint(0, 25))) for _ in range(3000)]
    texts += [" " * 50_000, "a" * 50_000, "\n" * 50_000, "中" * 50_000, "<think>" * 5_000]
    one = at_once(tokenizer)
    assert one._fast is not None
    assert one._fast(texts, False) == alone(tokenizer, texts)


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

    def __init__(self, one: BulkTokenizer, wrong_from: int = 0) -> None:
        self.taken: list[int] = []
        self.wrong_from, self.usual = wrong_from, one._usual
        one.__dict__["_fast"] = self

    def __call__(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        self.taken.append(len(texts))
        right = self.usual(texts, add_special_tokens)
        return [ids if place < self.wrong_from else [*ids, 0] for place, ids in enumerate(right)]


def test_the_fast_way_is_taken_where_it_is_worth_it() -> None:
    tokenizer = trained(CUTS["qwen2"])
    one = BulkTokenizer(tokenizer, [])
    noted = Noted(one, wrong_from=10**9)
    one.ids(MANY[:100])
    assert noted.taken == []  # few, and the first ones
    one._seen = bulk._WORTH_IT * len(tokenizer)
    one.ids(MANY[:100])
    assert noted.taken == []  # few
    one.ids(MANY)
    assert noted.taken == [len(MANY) / bulk._COMPARED, len(MANY)]
    one.ids(["long " * len(MANY) * 10])
    assert noted.taken[2:] == [1, 1]


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


def test_what_is_refused_is_made_by_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning, for want of a wheel, and by a text that its regular expressions can't get through."""
    unknown = {"unk_token": "<unk>", "special_tokens": ["<unk>"]}
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, **unknown)
    unigram = trained([], models.Unigram(), trainer)
    assert at_once(unigram)._fast is None
    assert at_once(unigram).ids(MANY) == alone(unigram, MANY)

    def gives_up(*_: Any) -> list[list[int]]:
        raise ValueError("match limit exceeded")

    tokenizer = trained(CUTS["qwen2"])
    one = at_once(tokenizer)
    one.__dict__["_fast"] = gives_up
    assert one.ids(MANY) == alone(tokenizer, MANY)

    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert at_once(tokenizer)._fast is None
    assert at_once(tokenizer).ids(MANY) == alone(tokenizer, MANY)
