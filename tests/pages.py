"""Stores of given texts, to make pages of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from hypothesis import strategies as st

from raytune_ds.data.labels import Label
from raytune_ds.data.store import Manifest, Part, Split, Store, doc_id, pack_documents
from tests.stores import DOCUMENTS, write_table

SEQ_LEN = 64
EVIL = (
    "</span></mark><script>document.title = 'run'</script>"
    "<img src=http://x.invalid/a.png onerror=\"document.title='run'\"><b style='position:fixed'>\"'&amp;&lt;</b>"
    " \u202eesrever\u202c \x00\x1b[31m\r\n\ttab  two\u200bnone"
    " <｜Assistant｜><｜end▁of▁sentence｜> 你好😀 {{ 7 * 7 }} {% raw %}</style></title><!--"
)
TEXTS = st.text(max_size=60) | st.sampled_from(
    [EVIL, "a  b\n\n\tc", "你好，世界😀", "</mark><mark>", "e\u0301"]
)


class Doc(NamedTuple):
    """A document of a test."""

    ids: list[int]
    weights: list[float]
    source: int = 0
    row: int = 0
    label: Label = Label.PLAIN


def store_of(
    folder: Path, packs: Sequence[Sequence[Doc]], names: Sequence[str] = ("news",), **changes: Any
) -> Store:
    """A store of these packs, each source with a file of its own; `changes` are of the manifest."""
    docs = [doc for pack in packs for doc in pack]
    table = pa.table(
        {
            "ids": [doc.ids for doc in docs],
            "weights": [doc.weights for doc in docs],
            "doc": [doc_id(doc.source, doc.row) for doc in docs],
            "label": [doc.label for doc in docs],
        },
        schema=DOCUMENTS,
    )
    numbers = iter(range(len(docs)))
    write_table(
        pack_documents([[next(numbers) for _ in pack] for pack in packs], table),
        f"{folder}/train-last.parquet",
    )
    parts = {name: _part([doc for doc in docs if doc.source == n]) for n, name in enumerate(names)}
    whole = _part(docs)
    files = tuple(f"/data/{name}.jsonl" for name in names)
    values = {
        "fingerprint": "0123abcd",
        "seq_len": SEQ_LEN,
        "train": Split(
            (("train-last.parquet", len(packs)),),
            len(packs),
            whole.num_docs,
            whole.num_tokens,
            whole.num_supervised,
            {name: part for name, part in parts.items() if part.num_docs},
        ),
        "eval": Split(),
        "files": files,
        "formats": dict.fromkeys(files, "alpaca"),
        "tokenizer": "org/model",
        "num_rows": 1234,
        "num_rejected": 0,
        "rejected_reasons": {},
        "num_truncated": 21,
        "num_dropped_long": 34,
        "length_histogram": {"32": 1200, "64": 7},
        "sources": tuple(names),
        "file_sources": tuple(range(len(names))),
    }
    return Store(str(folder), Manifest(**values | changes))


def _part(docs: Sequence[Doc]) -> Part:
    tokens = sum(len(doc.ids) - 1 for doc in docs)
    return Part(len(docs), tokens, sum(weight != 0 for doc in docs for weight in doc.weights[1:]))


def doc_of(tokenizer: Any, prompt: str, answer: str, **more: Any) -> Doc:
    """An answer that is trained on behind a prompt that is not."""
    context, trained = (list(tokenizer(text)["input_ids"]) for text in (prompt, answer))
    return Doc(context + trained, [0.0] * len(context) + [1.0] * len(trained), **more)
