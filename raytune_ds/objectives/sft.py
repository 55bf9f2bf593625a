"""Supervised fine-tuning and continued pretraining: the weighted cross-entropy of the supervised tokens.

One function for both: they differ in the rows they take (data/inputs.py). Of raw text every token is supervised.
"""

from __future__ import annotations

import torch
from torch import nn

from raytune_ds.data.batch import Batch


def sft(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of each document: the sum over its supervised tokens of weight times negative log-likelihood in nats.

    Args:
        model: a PackedLM: batch to losses [N] of its supervised tokens.
        batch: whose weights say how much each target counts.

    Returns:
        float32 [S], one a document of the batch.
    """
    return batch.by_segment(model(batch) * batch.weights_N)
