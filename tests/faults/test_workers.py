"""Workers that are killed, or stop answering: the run goes on to the same losses, each step once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.faults.workers import befall
from tests.helpers import Run, step_losses


def test_workers_that_die_or_hang_cost_only_time(
    run: Run,
    settings: tuple[str, ...],
    calm_losses: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kill -9 of a rank, and later one that is suspended: to the bit the losses of an undisturbed run."""
    killed = befall(tmp_path / "befallen", 20, psutil.Process.kill)
    stopped = befall(tmp_path / "befallen", 60, psutil.Process.suspend)
    result = run("run.name=befallen", "scaling.hang_timeout_s=8", *settings)
    assert killed, "the run ended before anything was killed"
    after_kill, after_hang = result.restarts
    assert 0 <= after_kill["last_step"] - after_kill["from_step"] < 14  # a checkpoint may be in flight
    assert all(
        after_kill[part] is not None for part in ("noticing_s", "starting_s", "loading_s", "first_step_s")
    )
    assert step_losses(result.run) == calm_losses
    shown = capsys.readouterr()
    assert "resuming from the checkpoint of step" in shown.out
    # Whoever hangs is found, and every stack is kept.
    assert after_hang["why"].startswith("workers hung: no sign of life: worker")
    assert not stopped[0].is_running()
    [folder] = (tmp_path / "befallen" / "hangs").iterdir()
    texts = [file.read_text() for file in sorted(folder.iterdir())]
    assert len(texts) == 2
    assert all("raytune_ds/loop.py" in text for text in texts)
    assert f"process {stopped[0].pid}, stopped" in "".join(texts)
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
