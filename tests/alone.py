"""A whole worker in this process, without Ray: what it needs, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_ds import storage
from raytune_ds.assignment import Assignment, Base
from raytune_ds.compose import dump
from raytune_ds.config import Config
from raytune_ds.data.batch import read
from raytune_ds.data.store import Store
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.ending import Outcome
from raytune_ds.hooks import Orders, Report
from raytune_ds.model.folder import fingerprint
from raytune_ds.rundir import RunDir
from raytune_ds.worker import run_worker
from raytune_ds.world import World
from tests.stores import store_of

STEPS = 14
Events = list[tuple[str, dict[str, Any]]]


def prepared(root: Path) -> Store:
    """A store of 20 packs where runs below `root` look for it."""
    folder = root / ".prepared" / "0123"
    folder.mkdir(parents=True)
    return store_of(folder, 20)


def assignment(
    store: Store,
    model: Path,
    root: str,
    name: str,
    adapter: dict[str, Any] | None = None,
    keep: int = 2,
    of_model: dict[str, Any] | None = None,
    **train: Any,
) -> Assignment:
    """Of a run of STEPS steps below `root`, with a checkpoint every four; `train` are more of its settings."""
    config = Config(
        run={"name": name, "storage": root},
        model={"name": str(model), "dtype": "float32", **(of_model or {})},
        train={"global_batch": 4, "max_steps": STEPS, "learning_rate": 1e-2, **train},
        adapter=adapter or {},
        checkpoint={"every_steps": 4, "keep": keep},
        tracking={"to": []},
        engine={"kind": "ddp"},
    )
    base = Base(fingerprint(model), None, 1, 1)
    run = RunDir(f"{root}/{name}")
    storage.write_bytes(run.config, dump(config).encode())
    return Assignment(config, config.model, base, TokenizerSpec.of(config.model), store, run, None)


def work(given: Assignment, report: Report, orders: Orders | None = None) -> Outcome:
    """Runs it, from its newest checkpoint on."""
    return run_worker(
        given,
        World.alone(),
        lambda store, share, steps: read(store, "train", share, steps),
        report,
        orders,
    )
