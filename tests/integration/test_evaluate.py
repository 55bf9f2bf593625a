"""A run that was really trained, measured by workers of Ray Data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ds.errors import UserError
from raytune_ds.evaluate import Wish, measure
from raytune_ds.evaluation.datasets import HELD_OUT
from tests.helpers import metrics, write_jsonl
from tests.integration.conftest import FACTS, Colours
from tests.runs import finished_run


def test_workers_of_ray_data_find_what_this_process_finds(colours: Colours, tmp_path: Path) -> None:
    """Losses before and after training are those that training itself has measured; answers keep the rows' order."""
    path = colours.result.run
    questions = write_jsonl(tmp_path / "questions.jsonl", FACTS[:11])
    wish = Wish(data=(str(questions),), batch_size=3, num_workers=2)
    there = measure(path, wish)
    said = [json.loads(line) for line in (Path(path) / "evaluation/answers.jsonl").read_text().splitlines()]
    here = measure(path, Wish(data=(str(questions),), batch_size=5, num_workers=0))
    for name in (HELD_OUT, "questions.jsonl"):
        for one, other in zip(there.of(name).metrics, here.of(name).metrics, strict=True):
            assert one.name == other.name
            assert one.tuned.value == pytest.approx(other.tuned.value, rel=1e-4)
            assert one.base is not None
            assert other.base is not None
            assert one.base.value == pytest.approx(other.base.value, rel=1e-4)
    again = [json.loads(line) for line in (Path(path) / "evaluation/answers.jsonl").read_text().splitlines()]
    assert said == again
    assert [row["expected"] for row in said] == [fact["output"] for fact in FACTS[:11]]
    assert there.of(HELD_OUT).settings["step"] == 12
    loss = there.of(HELD_OUT).metric("loss")
    measured = [row["eval_loss"] for row in metrics(path) if "eval_loss" in row]
    assert loss.base is not None
    assert loss.base.value == pytest.approx(measured[0], rel=1e-4)
    assert loss.tuned.value == pytest.approx(measured[-1], rel=1e-4)
    assert there.of("questions.jsonl").metric("loss").is_better


@pytest.mark.usefixtures("ray_session")
def test_a_mistake_in_a_worker_is_the_user_s(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The base model has gone since: the adapter can't be loaded, in whatever process."""
    run = finished_run(tmp_path, tiny_models["qwen2"])
    questions = write_jsonl(tmp_path / "questions.jsonl", FACTS[:2])
    config = run / "final" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="there is no such directory"):
        measure(str(run), Wish(data=(str(questions),), num_workers=1))
