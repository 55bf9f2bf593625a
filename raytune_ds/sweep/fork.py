"""A run that begins with a checkpoint of another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytune_ds import catalog, storage
from raytune_ds.assignment import differences
from raytune_ds.rundir import RunDir, to_lines
from raytune_ds.sweep.space import MUTABLE

# The learning rate of a step follows from these alone, so a run can go on with other ones, too.
_SCHEDULE = ("train.lr_scheduler_type", "train.warmup_ratio", "train.warmup_steps")
MAY_DIFFER = (*MUTABLE, *_SCHEDULE)
"""Settings of a checkpoint's run that a fork need not share."""


def hindrances(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The settings, each with both values, that keep a run from beginning with the checkpoint of another one.

    Args:
        there: the identity in the checkpoint's manifest.
        here: that of the run; see Assignment.identity.
    """
    return [f"{key}: {a} there, {b} here" for key, a, b in differences(there, here) if key not in MAY_DIFFER]


def fork(source: RunDir, step: int, target: RunDir, identity: dict[str, Any]) -> None:
    """Copies a checkpoint, and the metrics up to it, to a new run; one that has it already is left alone.

    Args:
        source: the run that has the checkpoint.
        step: of the checkpoint.
        target: the new run.
        identity: of the new run, which may differ in MAY_DIFFER.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if catalog.newest_complete(target.checkpoints) is not None:
        return
    path, copy = (catalog.directory(run.checkpoints, step) for run in (source, target))
    manifest = catalog.read_manifest(path)
    storage.write_bytes(target.metrics, to_lines(row for row in source.read_metrics() if row["step"] <= step))
    for name in storage.list_names(source.initial):  # an adapter is relative to what it began with
        storage.copy(f"{source.initial}/{name}", f"{target.initial}/{name}")
    for file in manifest.files:
        storage.copy(f"{path}/{file.name}", f"{copy}/{file.name}")
    catalog.write_manifest(copy, replace(manifest, identity=identity))
