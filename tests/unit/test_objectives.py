"""Objectives by their names in the config; what they give is the plain sum of the weighted losses."""

from __future__ import annotations

from typing import Any, get_args

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raytune_ds.config import ObjectiveConfig
from raytune_ds.data.batch import Batch, collate
from raytune_ds.data.formats import Example
from raytune_ds.data.store import pack_documents
from raytune_ds.data.template import Encoded, Encoder
from raytune_ds.objectives import OBJECTIVES
from tests.stores import DOCUMENTS

TEXTS = ("Plain text, the first.", "今天天气很好。", "The third has 3 parts.")


def test_every_kind_of_the_config_is_there() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveConfig.model_fields["kind"].annotation))


class Bigrams(nn.Module):
    """A language model that sees one token: what a PackedLM gives, without the rest of a model."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocabulary, vocabulary)

    def forward(self, batch: Batch) -> torch.Tensor:
        logits = self.logits(batch.ids_BT[0, batch.supervised_N])
        return F.cross_entropy(logits, batch.targets_N, reduction="none")


def text_batch(encoded: list[Encoded]) -> Batch:
    """Texts as one pack, the way the store makes it."""
    columns: dict[str, Any] = {"ids": [e.ids for e in encoded], "weights": [e.weights for e in encoded]}
    columns |= {"doc": range(len(encoded)), "label": [e.label for e in encoded]}
    documents = pa.table(columns, schema=DOCUMENTS)
    row = pack_documents([range(len(encoded))], documents).slice(0, 1)
    return collate([{name: row.column(name)[0].values.to_numpy() for name in row.column_names}])


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_raw_text_is_trained_on_with_the_cross_entropy_of_every_token(tiny_tokenizer: Any, kind: str) -> None:
    batch = text_batch([Encoder(tiny_tokenizer).encode(Example(text=text))[0] for text in TEXTS])
    model = Bigrams(len(tiny_tokenizer))
    expected = []
    for text in TEXTS:
        bare = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tiny_tokenizer.bos_token_id, *bare, tiny_tokenizer.eos_token_id])
        expected.append(F.cross_entropy(model.logits(ids[:-1]), ids[1:], reduction="sum"))
    torch.testing.assert_close(OBJECTIVES[kind](model, batch), torch.stack(expected))
    assert batch.weight == batch.num_tokens  # so that the loop's mean is the mean over all tokens
