"""What the benches train on: documents as token ids, of which some are trained on.

From files of real rows where there is a folder of them; else random ids whose lengths, and shares that are trained on,
are distributed as in those files (measured with a tokenizer of 16,000 tokens trained on the same rows).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytune_ds.data.formats import to_example
from raytune_ds.data.template import Encoder
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.model import tiny
from tests.bench.datarows import Rows, rows_of

SEED = 0


@dataclass(frozen=True)
class Document:
    """Token ids, and which of them are trained on."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class Corpus:
    """Documents, and where they are from."""

    name: str
    documents: tuple[Document, ...]

    @property
    def tokens(self) -> int:
        """Real ones."""
        return sum(len(d.ids) for d in self.documents)

    @property
    def supervised(self) -> int:
        """Targets that are trained on; the first token of a document is none."""
        return sum(sum(d.supervised[1:]) for d in self.documents)

    def write(self, path: Path) -> Path:
        """JSON lines of labels and ids, as the Hugging Face libraries name them."""
        with path.open("w", encoding="utf-8") as file:
            for d in self.documents:
                labels = [i if s else -100 for i, s in zip(d.ids, d.supervised, strict=True)]
                file.write(json.dumps({"input_ids": d.ids, "labels": labels}) + "\n")
        return path


def draw(
    name: str, lengths: Sequence[float], shares: Sequence[float], places: np.ndarray, vocabulary: int
) -> Corpus:
    """Random ids by quantiles (equally far apart, from 0 to 1) of lengths and of the share that is trained on.

    `places` are those of the documents, from 0 to 1.
    """
    rng = np.random.default_rng(SEED)
    sizes = _quantile(lengths, rng.permutation(places)).round().astype(int)
    trained = _quantile(shares, rng.permutation(places))
    documents = []
    for size, share in zip(sizes, trained, strict=True):
        answer = min(int(size) - 1, max(1, round(size * share)))
        ids = rng.integers(3, vocabulary, int(size)).tolist()
        documents.append(Document(ids, [False] * (int(size) - answer) + [True] * answer))
    return Corpus(name, tuple(documents))


def _quantile(values: Sequence[float], at: np.ndarray) -> np.ndarray:
    return np.interp(at, np.linspace(0, 1, len(values)), values)


QUANTILES: dict[str, tuple[list[int], list[float]]] = {
    # 999 rows of alpaca_en_demo.json, 172 tokens on average, padded at 4 and 8 rows to 1.9 and 2.3 times as many.
    "alpaca": (
        [18, 28, 34, 38, 43, 51, 58, 77, 93, 114, 133, 154, 178, 204, 238, 278, 304, 338, 381, 418, 701],
        [0.05, 0.33, 0.46, 0.6, 0.75, 0.85, 0.9, 0.93, 0.95, 0.96, 0.98],
    ),
    # 300 rows of glaive_toolcall_en_demo.json without the few above 2,048 tokens.
    "glaive": (
        [
            111,
            148,
            164,
            183,
            194,
            227,
            254,
            275,
            293,
            304,
            325,
            364,
            397,
            447,
            512,
            607,
            692,
            776,
            901,
            1085,
            2048,
        ],
        [0.14, 0.24, 0.29, 0.32, 0.35, 0.38, 0.41, 0.73, 0.82, 0.87, 0.96],
    ),
    # Ours: reports of some pages with a short answer at the end.
    "long": ([1024, 2048, 3072, 4096, 6144, 8192], [0.03, 0.1, 0.25]),
}
LONGEST = 2048
# Of the lengths, from where on documents are among the longest.
LONG = 0.99
SEQ_LEN = {"alpaca": 1024, "glaive": 2048, "long": 8192}
"""Of packs: the smallest power of two in which no document is cut."""


def of(name: str, count: int, vocabulary: int, folder: Path | None, longest: bool = False) -> Corpus:
    """`count` documents of a key of QUANTILES: real ones where `folder` has them, else drawn.

    They are spread evenly over the lengths and shuffled, so that few of them are like all; with `longest`, they are the
    longest ones, which decide how much memory an epoch takes.

    Args:
        name: a key of QUANTILES.
        count: of documents.
        vocabulary: of the model; ids are below it.
        folder: that may hold the files of tests.bench.datarows.
        longest: see above.
    """
    real = next((rows for rows in rows_of(folder) if rows.name == name), None)
    if real is None:
        lengths, shares = QUANTILES[name]
        return draw(name, lengths, shares, _places(count, longest), vocabulary)
    encoder = _encoder(real)
    form = "alpaca" if "instruction" in real.originals[0] else "sharegpt"
    encoded = (each for row in real.originals for each in encoder.encode(to_example(row, form)))
    fitting = sorted((each for each in encoded if len(each.ids) <= LONGEST), key=lambda each: len(each.ids))
    even = (_places(count, longest) * (len(fitting) - 1)).round().astype(int)
    chosen = (fitting[place] for place in np.random.default_rng(SEED).permutation(even))
    documents = [Document(each.ids, [w != 0 for w in each.weights]) for each in chosen]
    return Corpus(f"{name} rows", tuple(documents))


def _places(count: int, longest: bool) -> np.ndarray:
    """Quantiles of lengths, from 0 to 1."""
    return np.linspace(LONG, 1, count) if longest else (np.arange(count) + 0.5) / count


def _encoder(rows: Rows) -> Encoder:
    with tempfile.TemporaryDirectory() as folder:
        tiny.train_tokenizer(rows.texts(), 16_000).save_pretrained(folder)
        return Encoder(load_tokenizer(TokenizerSpec(folder)))
