"""`ray job submit` to a cluster that `ray start --head` made on this machine, as the README has it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.head import Head
from tests.helpers import step_losses, write_jsonl


def test_a_submitted_job_trains_and_its_log_reads_well(token_head: Head, tmp_path: Path) -> None:
    """Config and data travel with the working directory; the run goes to shared storage."""
    folder, storage = tmp_path / "job", tmp_path / "storage"
    folder.mkdir()
    rows = [{"prompt": f"count to {i}", "completion": " ".join(map(str, range(i)))} for i in range(2, 40)]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "my.yaml").write_text(
        "data: {sources: rows.jsonl, seq_len: 128}\ntrain: {max_steps: 12, global_batch: 4}\n"
    )
    done = token_head.submit(folder, "--config", "my.yaml", f"run.storage={storage}", "run.name=job")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(step_losses(str(storage / "job"))) == 12
    assert json.loads((storage / "job" / "result.json").read_text())["num_workers"] == 2
    log = done.stdout
    for words in ("on the Ray cluster at", "training steps 1 to 12", "finished: 12 steps", "saved:"):
        assert words in log
    assert "Traceback" not in log
    assert "RayTrainWorker" not in log, "libraries' lines drown ours"


def test_a_mistake_fails_the_job_with_our_message(token_head: Head, tmp_path: Path) -> None:
    """Not with a stack of Ray's."""
    folder = tmp_path / "job"
    folder.mkdir()
    failed = token_head.submit(folder, "data.sources=missing.jsonl", f"run.storage={tmp_path}")
    assert failed.returncode != 0
    assert "missing.jsonl" in failed.stdout
    assert "no such file" in failed.stdout
    assert "Traceback" not in failed.stdout.split("Job submission server address")[0]
