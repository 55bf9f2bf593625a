"""Token ids of many texts at once, by the fastest of those that make what the tokenizer itself makes.

transformers calls a tokenizer text by text. What a fast one is made around takes many at once; fastokens reads the same
tokenizer.json and takes a tenth of the time, but seconds to begin with where the vocabulary is large. Either has to
make the same of texts that are tried first, and fastokens of some of every batch.

Who makes the ids of a text depends on that text, its batch and on what is to come, never on what was: so a preparation
comes out the same whoever is at which of its parts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_Ids = list[list[int]]
_Way = Callable[[Sequence[str], bool], _Ids]

_TRIED = ("a", " a b", "\n\na", "", "好 😀 e\u0301", "3.14159 <think>", "don't  I'LL\t\r\n x\u00a0\u3000é١٢٣")
# Characters to come for each entry of the vocabulary: a quarter of them takes as long as fastokens takes to begin.
_WORTH_IT = 320
# Characters of a batch that is large enough for it.
_LARGE = 1 << 16
# Both make the beginnings, of so many characters, of one text in so many; a prime, for texts come in turn.
_COMPARED, _COMPARED_CHARS = 61, 2000
# What cutting patterns take for an s, and for white space: fastokens 0.3.5 does not. See tests/unit/test_bulk.py.
_OTHERWISE = re.compile("[\u017f\u180e]")


class BulkTokenizer:
    """One tokenizer, for many texts at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tried: Sequence[str], num_chars: int) -> None:
        """`tried` are texts like those to come, of which there are `num_chars` characters."""
        self._tokenizer, self._tried = tokenizer, [*tried, *_TRIED]
        self._is_worth_it = num_chars >= _WORTH_IT * len(tokenizer)

    def ids(self, texts: Sequence[str], add_special_tokens: bool = False) -> _Ids:
        """Token ids of texts; with `add_special_tokens` what the tokenizer puts around a text by itself."""
        if self._is_worth_it and sum(map(len, texts)) >= _LARGE and self._fast is not None:
            found = self._fast_ids(self._fast, texts, add_special_tokens)
            if found is not None:
                return found
        return self._usual(texts, add_special_tokens)

    def text(self, ids: list[int]) -> str:
        """What token ids say, control tokens included."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @cached_property
    def parts(self) -> dict[str, Any]:
        """The tokenizer.json of a fast one."""
        return dict(json.loads(self._tokenizer.backend_tokenizer.to_str()))  # type: ignore[attr-defined]

    def _fast_ids(self, way: _Way, texts: Sequence[str], add_special_tokens: bool) -> _Ids | None:
        """None where it is not the same as usual."""
        some = [text[:_COMPARED_CHARS] for text in texts[::_COMPARED] if not _OTHERWISE.search(text)]
        try:
            if way(some, add_special_tokens) != self._usual(some, add_special_tokens):
                return None
            found = way(texts, add_special_tokens)
        except ValueError:  # its regular expressions have so much memory and no more
            return None
        for place, text in enumerate(texts):
            if not text.isascii() and _OTHERWISE.search(text):
                (found[place],) = self._usual([text], add_special_tokens)
        return found

    def _one_by_one(self, texts: Sequence[str], add_special_tokens: bool) -> _Ids:
        return [
            list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
            for text in texts
        ]

    @cached_property
    def _usual(self) -> _Way:
        return self._one_by_one if self._backend is None else partial(_by_backend, self._backend)

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """What a fast tokenizer is made around."""
        if not self._tokenizer.is_fast:
            return None
        backend = Tokenizer.from_str(self._json)
        return backend if self._is_same(partial(_by_backend, backend)) else None

    @cached_property
    def _fast(self) -> _Way | None:
        if self._backend is None:
            return None
        # Tasks have a CPU each; every thread has a cache of its own, of 80 MiB at most.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        try:
            from fastokens import Tokenizer as Fast

            way = partial(_by_fast, Fast.from_json_str(self._json))
        # there is no wheel for this machine; or the tokenizer has a step that it does not know
        except (ImportError, ValueError):
            return None
        return way if self._is_same(way) else None

    def _is_same(self, way: _Way) -> bool:
        try:
            return all(way(self._tried, add) == self._one_by_one(self._tried, add) for add in (False, True))
        except Exception:  # of what a vocabulary has no token for; tokenizers raises nothing narrower
            return False

    @property
    def _json(self) -> str:
        return json.dumps({**self.parts, "padding": None, "truncation": None})


def _by_backend(backend: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> _Ids:
    found = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in found]


def _by_fast(fast: Any, texts: Sequence[str], add_special_tokens: bool) -> _Ids:
    return [encoding.ids for encoding in fast.encode_batch(list(texts), add_special_tokens)]
