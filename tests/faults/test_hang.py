"""A worker that stops answering: it is found, every stack is kept, and the run goes on to the same losses."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.faults.workers import befall
from tests.helpers import Run, step_losses


def test_a_worker_that_stops_answering_is_found(
    run: Run,
    settings: tuple[str, ...],
    calm_losses: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped = befall(tmp_path / "stuck", 20, psutil.Process.suspend)
    result = run("run.name=stuck", "scaling.hang_timeout_s=8", *settings)
    assert len(result.restarts) == 1
    assert result.restarts[0]["why"].startswith("workers hung: no sign of life: worker")
    assert not stopped[0].is_running()
    [folder] = (tmp_path / "stuck" / "hangs").iterdir()
    texts = [file.read_text() for file in sorted(folder.iterdir())]
    assert len(texts) == 2
    assert all("raytune_ds/loop.py" in text for text in texts)
    assert f"process {stopped[0].pid}, stopped" in "".join(texts)
    assert step_losses(result.run) == calm_losses
    shown = capsys.readouterr()
    assert f"the stacks of all workers are in {folder}" in shown.err
    assert "training again after" in shown.out


@pytest.mark.slow
def test_of_a_collective_that_times_out_the_rank_is_named_that_did_not_come(
    run: Run, settings: tuple[str, ...], calm_losses: list[float], tmp_path: Path
) -> None:
    """The others give up before anybody looks for a hang."""
    stopped = befall(tmp_path / "late", 20, psutil.Process.suspend)
    timeouts = ("scaling.hang_timeout_s=null", "scaling.collective_timeout_s=8")
    result = run("run.name=late", *timeouts, *settings)
    [restart] = result.restarts
    assert "; did not come: worker " in restart["why"]
    assert not stopped[0].is_running()
    assert step_losses(result.run) == calm_losses
