"""`ray job submit` of what can't be trained; tests/faults/test_stop.py submits what can."""

from __future__ import annotations

from pathlib import Path

from tests.head import Head


def test_a_mistake_fails_the_job_with_our_message(token_head: Head, tmp_path: Path) -> None:
    """Not with a stack of Ray's."""
    folder = tmp_path / "job"
    folder.mkdir()
    failed = token_head.submit(folder, "data.sources=missing.jsonl", f"run.storage={tmp_path}")
    assert failed.returncode != 0
    assert "missing.jsonl" in failed.stdout
    assert "no such file" in failed.stdout
    assert "Traceback" not in failed.stdout.split("Job submission server address")[0]
