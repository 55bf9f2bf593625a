"""Objectives: a model and a batch to the loss of each document, a sum. The loop divides by the global weight, so no
objective averages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from raytune_ds.data.batch import Batch
from raytune_ds.objectives.sft import sft

Objective = Callable[[nn.Module, Batch], torch.Tensor]

OBJECTIVES: dict[str, Objective] = {"sft": sft, "pretrain": sft}
"""By `objective.kind`: each gives the weighted losses of a batch's documents, [S], whose sum is run backward from."""
