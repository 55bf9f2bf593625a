"""Losses apart by source add up to the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raytune_ds.bysource import UNTOLD, Sources
from raytune_ds.data.batch import Batch, collate
from raytune_ds.data.store import Manifest, Split, Store, doc_id
from tests import alone
from tests.helpers import metrics
from tests.stores import store_of

SOURCES = Sources(("law", "chat"), (0, 1, 0))
LOSSES = torch.tensor([1.0, 2.0, 4.0])


def batch() -> Batch:
    """Documents of the third, second and first file; their weights add up to 1, 2.5 and 0."""
    pack = {
        "ids": np.arange(6),
        "targets": np.arange(6),
        "weights": np.array([0, 1, 2, 0.5, 0, 0]),
        "lengths": np.array([2, 3, 1]),
        "docs": np.array([doc_id(2, 7), doc_id(1, 7), doc_id(0, 3)]),
    }
    return collate([pack])


def test_sums_are_of_all_and_of_each_source() -> None:
    assert SOURCES.sums(batch(), LOSSES).tolist() == [7.0, 5.0, 2.0]
    assert SOURCES.sums(batch(), batch().weights_S).tolist() == [3.5, 1.0, 2.5]
    assert UNTOLD.sums(batch(), LOSSES).tolist() == [7.0]


def test_the_empty_batch_adds_nothing() -> None:
    empty = collate([])
    assert (SOURCES.nothing(torch.device("cpu")) + SOURCES.sums(empty, empty.weights_S)).tolist() == [0, 0, 0]


def test_means_leave_out_sources_that_are_not_there() -> None:
    assert SOURCES.means("loss", [7, 5, 2], [3.5, 1, 2.5]) == {"loss": 2, "loss/law": 5, "loss/chat": 0.8}
    assert SOURCES.means("loss", [7, 7, 0], [3.5, 3.5, 0]) == {"loss": 2, "loss/law": 2}
    assert UNTOLD.means("eval_loss", [7], [2]) == {"eval_loss": 3.5}


@pytest.mark.parametrize(("names", "told"), [(("law", "chat"), True), (("law",), False)])
def test_a_single_source_needs_no_second_name(names: tuple[str, ...], told: bool) -> None:
    manifest = Manifest("", 8, Split(), Split(), ("a", "b"), {}, "", 0, 0, {}, 0, 0, {})
    store = Store("", replace(manifest, sources=names, file_sources=(0, len(names) - 1)))
    assert Sources.of(store) == (Sources(names, (0, 1)) if told else UNTOLD)


def test_a_run_tells_the_loss_of_each_source_in_steps_and_evaluations(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """Those of a step enclose that of all; with one source there is nothing beside it."""
    folder = tmp_path / ".prepared" / "0123"
    folder.mkdir(parents=True)
    store = store_of(folder, 20, ("/law.jsonl", "/chat.jsonl"), sources=("law", "chat"), file_sources=(0, 1))
    store = replace(store, manifest=replace(store.manifest, eval=store.manifest.train))
    alone.work(alone.assignment(store, tiny_models["qwen2"], str(tmp_path), "two"), lambda *_: None)
    steps = [row for row in metrics(str(tmp_path / "two")) if "loss" in row]
    measured = [row for row in metrics(str(tmp_path / "two")) if "eval_loss" in row]
    assert len(steps) == alone.STEPS
    for name, rows in (("loss", steps), ("eval_loss", measured)):
        assert len(rows) > 1
        for row in rows:
            parts = sorted((row[f"{name}/law"], row[f"{name}/chat"]))
            assert parts[0] < row[name] < parts[1]
    one = replace(store, manifest=replace(store.manifest, sources=("law",), file_sources=(0, 0)))
    alone.work(alone.assignment(one, tiny_models["qwen2"], str(tmp_path), "one"), lambda *_: None)
    assert not [key for row in metrics(str(tmp_path / "one")) for key in row if "/" in key]
    plain = [row["loss"] for row in metrics(str(tmp_path / "one")) if "loss" in row]
    assert plain == [row["loss"] for row in steps]
