"""What tells a prepared store from others: all that decides its content."""

from __future__ import annotations

import hashlib
import json

from raytune_ds.config import Config
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.store import VERSION
from raytune_ds.data.tokenizer import TokenizerSpec, traits_of

FOLDER = ".prepared"
"""Below `run.storage`, where all stores are."""


def fingerprint_of(config: Config, inputs: Inputs, tokenizer: TokenizerSpec) -> str:
    """A hash over all that decides the store's content; where the files lie does not."""
    state = {
        "version": VERSION,
        "inputs": [
            (content, item.format, item.source.index, item.max_rows)
            for content, item in zip(inputs.contents, inputs.items, strict=True)
        ],
        "sources": [
            [source.model_dump(mode="json", exclude={"path"}) for source in sources or ()]
            for sources in (config.data.sources, config.data.eval.sources)
        ],
        "tokenizer": traits_of(tokenizer).fingerprint,
        "data": config.data.model_dump(mode="json", exclude={"sources", "chat_template", "on_finding"})
        | {"eval": config.data.eval.fraction},
        "seed": config.run.seed,
    }
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=8).hexdigest()
