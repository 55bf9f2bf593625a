"""What a side is told. Only the standard library: a side may live in another environment than the bench."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLA_TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@dataclass(frozen=True)
class Case:
    """A model, documents and a way to train: one optimizer step on all documents is a pass.

    Attributes:
        model: a Hugging Face directory.
        documents: JSON lines of input_ids and labels.
        lora: module names that get an adapter of rank 8; None trains all parameters.
        dtype: what is computed in: float32 or bfloat16.
        threads: that torch computes with.
        seq_len: of packs, for those who make any: no document is longer.
        options: of the side.
    """

    model: str
    documents: str
    lora: list[str] | None
    dtype: str = "float32"
    threads: int = 2
    seq_len: int = 2048
    learning_rate: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """For `told`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    def rows(self) -> list[dict[str, list[int]]]:
        """Of `documents`."""
        lines = Path(self.documents).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def told() -> Case:
    """The case that this process was started with."""
    return Case(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
