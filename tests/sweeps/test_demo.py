"""The whole bundled demo: what it says of itself has to be true."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ds.demo.run import demo, learned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.mark.usefixtures("ray_session")
def test_what_is_tuned_beats_its_base_beyond_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ways of training, by intervals that do not overlap."""
    reports = demo(str(tmp_path))
    assert {name: learned(report) for name, report in reports.items()} == {"lora": True, "full": True}
    assert "learned what prescriptions say" in capsys.readouterr().out
