"""Token ids of many texts at once, by the fastest of those that make what the tokenizer itself makes.

transformers calls a tokenizer text by text. What a fast one is made around takes many at once; fastokens reads the same
tokenizer.json and takes a tenth of the time, but seconds to begin with where the vocabulary is large. Either has to
make the same of texts that are tried first, and fastokens of some of every batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_Ids = list[list[int]]

_TRIED = ("a", " a b", "\n\na", "", "好 😀 e\u0301", "3.14159 <think>", "don't  I'LL\t\r\n x\u00a0\u3000é١٢٣")
# Characters for each entry of the vocabulary: what tokenizers takes for them, fastokens takes to begin with.
_WORTH_IT = 80
# A batch of fewer texts is nobody's bulk; of more, each of so many is made by both.
_COMPARED = 64


class BulkTokenizer:
    """One tokenizer, for many texts at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tried: Sequence[str]) -> None:
        """`tried` are texts like those to come."""
        self._tokenizer, self._tried = tokenizer, [*tried, *_TRIED]
        self._seen = 0

    def ids(self, texts: Sequence[str], add_special_tokens: bool = False) -> _Ids:
        """Token ids of texts; with `add_special_tokens` what the tokenizer puts around a text by itself."""
        if self._backend is None:
            return self._one_by_one(texts, add_special_tokens)
        self._seen += sum(map(len, texts))
        by_backend = partial(_by_backend, self._backend, add_special_tokens=add_special_tokens)
        return self._fast_ids(texts, add_special_tokens, by_backend) or by_backend(texts)

    def text(self, ids: list[int]) -> str:
        """What token ids say, control tokens included."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    @cached_property
    def parts(self) -> dict[str, Any]:
        """The tokenizer.json of a fast one."""
        return dict(json.loads(self._tokenizer.backend_tokenizer.to_str()))  # type: ignore[attr-defined]

    def _one_by_one(self, texts: Sequence[str], add_special_tokens: bool) -> _Ids:
        return [
            list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
            for text in texts
        ]

    def _fast_ids(
        self, texts: Sequence[str], add_special_tokens: bool, by_backend: Callable[[Sequence[str]], _Ids]
    ) -> _Ids | None:
        """None where it is not worth it, or not the same."""
        if len(texts) < _COMPARED or self._seen < _WORTH_IT * len(self._tokenizer) or self._fast is None:
            return None
        try:
            found = _by_fast(self._fast, texts, add_special_tokens)
        except ValueError:  # more of its regular expressions than they are given memory for
            return None
        compared = slice(None, None, _COMPARED)
        return found if found[compared] == by_backend(texts[compared]) else None

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """What a fast tokenizer is made around."""
        if not self._tokenizer.is_fast:
            return None
        backend = Tokenizer.from_str(self._json)
        return backend if self._is_same(partial(_by_backend, backend)) else None

    @cached_property
    def _fast(self) -> Any:
        # Tasks have a CPU each; every thread has a cache of its own, of 80 MiB at most.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        try:
            from fastokens import Tokenizer as Fast

            fast = Fast.from_json_str(self._json)
        # there is no wheel for this machine; or the tokenizer has a step that it does not know
        except (ImportError, ValueError):
            return None
        return fast if self._is_same(partial(_by_fast, fast)) else None

    def _is_same(self, ids: Callable[[Sequence[str], bool], _Ids]) -> bool:
        return all(ids(self._tried, add) == self._one_by_one(self._tried, add) for add in (False, True))

    @property
    def _json(self) -> str:
        return json.dumps({**self.parts, "padding": None, "truncation": None})


def _by_backend(backend: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> _Ids:
    found = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in found]


def _by_fast(fast: Any, texts: Sequence[str], add_special_tokens: bool) -> _Ids:
    return [encoding.ids for encoding in fast.encode_batch(list(texts), add_special_tokens)]
