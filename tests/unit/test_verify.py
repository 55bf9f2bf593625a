"""What `raytune-ds verify` proves, and everything that it must find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytune_ds import cli
from raytune_ds.catalog import Manifest
from raytune_ds.compose import dump
from raytune_ds.config import Config
from raytune_ds.data import prepared
from raytune_ds.data.rows import step_rows
from raytune_ds.data.store import Store
from raytune_ds.trained import Trained
from raytune_ds.verify import Report, examine
from tests.helpers import write_jsonl
from tests.stores import store_of

Row = dict[str, Any]
SEED, SLOTS, PACKS = 3, 8, 45
PER_EPOCH = 6
STEPS = 15  # two epochs and a half


@dataclass(frozen=True)
class Made:
    """A run of STEPS steps as it should be, before something is done to it."""

    root: Path
    path: Path
    store: Store
    rows: list[Row]

    def write(self, rows: list[Row] | None = None) -> None:
        write_jsonl(self.path / "metrics.jsonl", self.rows if rows is None else rows)

    def examine(self, rows: list[Row] | None = None) -> Report:
        self.write(rows)
        return examine(Trained.read(str(self.path)))


def row(step: int, batch: str, workers: int = 2) -> Row:
    return {"step": step, "loss": 1.0, "skipped": False, "batch": batch, "world_size": workers}


def write_config(path: Path, storage: Path, seed: int = SEED, slots: int = SLOTS, **run: Any) -> None:
    config = Config(
        run={"storage": str(storage), "seed": seed, **run},
        train={"global_batch": slots, "max_steps": 2 * STEPS},
    )
    (path / "config.json").write_text(dump(config))


def write_checkpoint(path: Path, step: int, store: Store, seed: int = SEED) -> None:
    identity = {"data": store.manifest.fingerprint, "run.seed": seed, "train": {"global_batch": SLOTS}}
    folder = path / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = Manifest(step, step, identity, {}, None, {}, ())
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    folder = tmp_path / prepared.FOLDER / "0123456789abcdef"
    folder.mkdir(parents=True)
    store = store_of(folder, PACKS)
    path = tmp_path / "tickets"
    path.mkdir()
    write_config(path, tmp_path)
    write_checkpoint(path, STEPS - 2, store)
    order = store.order("train", SLOTS, SEED)
    assert order.steps_per_epoch == PER_EPOCH
    workers = [1 if step < 4 else 3 if step < 9 else 2 for step in range(1, STEPS + 1)]
    rows: list[Row] = [{"step": 0, "eval_loss": 2.0}]
    for step, size in enumerate(workers, 1):
        rows.append(row(step, step_rows(store, order, step).batch, size))
    rows.append({"step": STEPS - 2, "checkpoint_wait_s": 0.1})
    return Made(tmp_path, path, store, rows)


def changed(rows: list[Row], step: int, **values: Any) -> list[Row]:
    return [{**row, **values} if row["step"] == step and "batch" in row else row for row in rows]


def without(rows: list[Row], *steps: int) -> list[Row]:
    return [row for row in rows if row["step"] not in steps or "batch" not in row]


def batch_of(made: Made, step: int) -> str:
    return next(row["batch"] for row in made.rows if row["step"] == step and "batch" in row)


# ---- what is right --------------------------------------------------------------------------------


def test_a_run_as_it_should_be_is_proved(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.write()
    assert cli.main(["verify", "--run", str(made.path)]) == 0
    told = capsys.readouterr().out
    docs = made.store.manifest.train.num_docs
    assert f"step {STEPS} of {2 * STEPS} on 1, then 3, then 2 worker(s)" in told
    assert f"│ 1 to 2 │  1 to 12 │ {docs} of {docs} │ each once  " in told
    assert "│ each once; partial: 3 of 6 steps │" in told
    assert "proved: every step once" in told
    assert (
        f"the {docs} rows exactly once in each of 2 whole epochs, no row more than once in the partial"
        in told
    )


def test_each_epoch_is_counted_by_itself(made: Made) -> None:
    report = made.examine()
    assert report.problems == report.notes == []
    steps = [(epoch.first, epoch.last, epoch.done) for epoch in report.epochs]
    assert steps == [(1, 6, 6), (7, 12, 12), (13, 18, 15)]
    assert [epoch.is_right for epoch in report.epochs] == [True] * 3
    docs = [epoch.trained for epoch in report.epochs]
    assert docs[0] == docs[1] == report.num_docs == report.num_rows
    assert 0 < docs[2] < report.num_docs


@pytest.mark.parametrize(("steps", "words"), [(0, "nothing was trained yet"), (3, "no row more than once")])
def test_a_run_that_has_just_begun(
    made: Made, capsys: pytest.CaptureFixture[str], steps: int, words: str
) -> None:
    shutil.rmtree(made.path / "checkpoints")
    write_checkpoint(made.path, 0, made.store)
    made.write([row for row in made.rows if row["step"] <= steps])
    assert cli.main(["verify", "--run", str(made.path)]) == 0
    assert words in capsys.readouterr().out


def test_skipped_and_left_out_steps_are_told(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    rows = changed(made.rows, 5, skipped=True, loss=None)
    rows = [{"step": 8, "left_out": True} if row["step"] == 8 else row for row in rows]
    report = made.examine(rows)
    assert report.problems == []
    assert report.notes == [
        "1 steps were read, but not applied (see train.max_skipped_steps): 5",
        "1 steps were left out (train.on_skipped_steps = rewind): 8",
    ]
    assert [epoch.is_right for epoch in report.epochs] == [True] * 3
    assert [epoch.passed_over > 0 for epoch in report.epochs] == [True, True, False]
    assert all(epoch.trained + epoch.passed_over == report.num_docs for epoch in report.epochs[:2])
    assert cli.main(["verify", "--run", str(made.path)]) == 0
    assert "but for those of the steps not applied" in capsys.readouterr().out


def test_a_last_line_that_is_half_written_does_no_harm(made: Made) -> None:
    made.write()
    with (made.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    assert examine(Trained.read(str(made.path))).problems == []


# ---- what is wrong --------------------------------------------------------------------------------

Damage = Callable[[Made], list[Row]]


def swapped(made: Made) -> list[Row]:
    return changed(changed(made.rows, 4, batch=batch_of(made, 7)), 7, batch=batch_of(made, 4))


WRONG: dict[str, tuple[Damage, list[str]]] = {
    "a step is missing": (lambda made: without(made.rows, 5), ["not in metrics.jsonl: steps 5"]),
    "steps are missing": (
        lambda made: without(made.rows, 5, 6, 7, 9),
        ["not in metrics.jsonl: steps 5 to 7, 9"],
    ),
    "the end is missing": (
        lambda made: without(made.rows, 13, 14, 15),  # there is a checkpoint of step 13
        ["not in metrics.jsonl: steps 13"],
    ),
    "the beginning is missing": (lambda made: without(made.rows, 1), ["not in metrics.jsonl: steps 1"]),
    "a step is there twice": (
        lambda made: [*made.rows, row(7, batch_of(made, 7))],
        ["more than once in metrics.jsonl: steps 7"],
    ),
    "a step was done again, with another batch": (
        lambda made: [*made.rows, row(7, "f" * 16)],
        ["more than once in metrics.jsonl: steps 7", "step 7: expected batch {7}, found ffffffffffffffff"],
    ),
    "two batches are swapped": (
        swapped,
        [
            "step 4: expected batch {4}, found {7}, which is that of step 7",
            "step 7: expected batch {7}, found {4}, which is that of step 4",
        ],
    ),
    "a batch is another one": (
        lambda made: changed(made.rows, 6, batch="0" * 16),
        ["step 6: expected batch {6}, found 0000000000000000"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_the_steps_is_found(
    made: Made, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, expected = WRONG[name]
    report = made.examine(damage(made))
    batches = [batch_of(made, step) if step else "" for step in range(STEPS + 1)]
    assert report.problems == [text.format(*batches) for text in expected]
    assert cli.main(["verify", "--run", str(made.path)]) == 2
    told = capsys.readouterr().out
    assert "NOT proved" in told
    assert "proved: every" not in told


def test_the_epoch_with_the_fault_is_shown(made: Made) -> None:
    report = made.examine(without(made.rows, 8))
    assert [epoch.is_right for epoch in report.epochs] == [True, False, True]


def test_another_seed_is_found_though_nobody_says_so(made: Made) -> None:
    write_config(made.path, made.root, seed=4)
    problems = made.examine().problems
    assert problems[0] == "config.json has run.seed = 4, and the run was trained with 3"
    assert sum("expected batch" in line for line in problems) == 10
    assert problems[-2:] == [
        "... and 5 more steps with another batch",
        "no batch is as expected: seed, train.global_batch or the prepared data are not those of the run",
    ]


def test_another_global_batch_is_found(made: Made) -> None:
    write_config(made.path, made.root, slots=9)
    problems = made.examine().problems
    assert "config.json has train.global_batch = 9, and the run was trained with 8" in problems
    assert sum("expected batch" in line for line in problems) == 10


@pytest.mark.parametrize("num_packs", [PACKS, PACKS - 1, PACKS + 1])
def test_a_store_that_has_changed_is_found(made: Made, num_packs: int) -> None:
    """Its files alone, of as many packs or of others."""
    other = made.root / "other"
    other.mkdir()
    store_of(other, num_packs, ("/a", "/b"))
    for shard in other.glob("*.parquet"):
        shutil.copy(shard, Path(made.store.path) / shard.name)
    problems = made.examine().problems
    if num_packs == PACKS:
        assert problems[0].startswith("step 1: expected batch ")
    else:
        assert "has changed" in problems[0]
        assert f"{num_packs} packs" in problems[0]


def test_two_rows_of_the_store_that_changed_places_are_found(made: Made) -> None:
    import pyarrow as pa

    from raytune_ds.data.store import read_table
    from tests.stores import write_table

    shard = Path(made.store.path) / made.store.manifest.train.shards[0][0]
    table = read_table(str(shard))
    docs = table.column("docs").to_pylist()
    docs[2][0], docs[9][0] = docs[9][0], docs[2][0]
    write_table(table.set_column(4, "docs", pa.array(docs, pa.list_(pa.int64()))), str(shard))
    wrong = [line for line in made.examine().problems if "expected batch" in line]
    assert 2 <= len(wrong) <= 6  # one or two steps of each epoch


def test_a_store_whose_files_are_damaged_is_told(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.write()
    for shard in Path(made.store.path).glob("*.parquet"):
        shard.write_bytes(b"no parquet")
    assert cli.main(["verify", "--run", str(made.path)]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_a_store_that_is_gone_is_told_with_what_to_do(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.write()
    shutil.rmtree(made.store.path)
    assert cli.main(["verify", "--run", str(made.path)]) == 2
    told = capsys.readouterr().err
    assert f"its prepared data (0123456789abcdef) are gone from {made.root}/.prepared" in told
    assert f"raytune-ds data --config {made.path}/config.json" in told


# ---- runs of before, of sweeps, and moved ones ------------------------------------------------------


def test_a_run_without_fingerprints_is_told_clearly(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.write([{key: value for key, value in row.items() if key != "batch"} for row in made.rows])
    assert cli.main(["verify", "--run", str(made.path)]) == 2
    told = capsys.readouterr().out
    assert (
        "steps 1 to 15 have no fingerprint of their batch, as an older version of raytune_ds trained them"
        in told
    )
    assert "expected batch" not in told
    assert "no batch is as expected" not in told


def test_a_run_that_was_begun_without_fingerprints(made: Made) -> None:
    rows = [
        {key: value for key, value in row.items() if key != "batch" or row["step"] > 6} for row in made.rows
    ]
    report = made.examine(rows)
    assert len(report.problems) == 1
    assert report.problems[0].startswith("steps 1 to 6 have no fingerprint")
    assert [epoch.is_right for epoch in report.epochs] == [False, True, True]


@pytest.mark.parametrize(
    "place", ["sweep/trials/0001", "sweep/trials/0003-from-0001-step-6", "sweep/promoted"]
)
def test_runs_of_sweeps_find_their_data(made: Made, place: str) -> None:
    """Also where run.storage was relative to a folder that nobody knows, and where all of it was moved."""
    path = made.root / place
    shutil.copytree(made.path, path)
    write_config(path, Path("runs/that/were"), name="sweep-0001")
    write_jsonl(path / "metrics.jsonl", made.rows)
    assert examine(Trained.read(str(path))).problems == []


def test_a_sweep_itself_is_no_run(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (made.root / "sweep").mkdir()
    (made.root / "sweep" / "sweep.json").write_text("{}")
    assert cli.main(["verify", "--run", str(made.root / "sweep")]) == 2
    assert "is a sweep; name runs of it" in capsys.readouterr().err


def test_without_a_checkpoint_the_data_are_found_as_a_run_finds_them(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from raytune_ds import trained

    shutil.rmtree(made.path / "checkpoints")
    asked: list[Config] = []

    def check(config: Config) -> Any:
        asked.append(config)
        return SimpleNamespace(config=config, inputs=None, tokenizer=None)

    monkeypatch.setattr(trained, "check", check)
    monkeypatch.setattr(prepared, "fingerprint_of", lambda *_: made.store.manifest.fingerprint)
    write_config(made.path, made.root, resume="never")
    assert made.examine().problems == []
    assert [config.run.resume for config in asked] == ["auto"]


def test_several_runs_are_all_looked_at(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.write()
    other = made.root / "other"
    shutil.copytree(made.path, other)
    write_jsonl(other / "metrics.jsonl", without(made.rows, 2))
    assert cli.main(["verify", "--run", str(other), str(made.root / "none"), str(made.path)]) == 2
    told = capsys.readouterr()
    assert told.out.index("not in metrics.jsonl: steps 2") < told.out.index("proved: every step once")
    assert "none: no run directory" in told.err
    assert cli.main(["verify", "--run", str(made.path), str(made.path)]) == 0


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{", "can't be read"),
        (
            "config.json",
            '{"run": {"surely_unknown": 1}}',
            "of another version of raytune_ds (run.surely_unknown",
        ),
        ("metrics.jsonl", "{}}\n", "can't be read"),
        ("metrics.jsonl", "[1]\n", "can't be read"),
        ("metrics.jsonl", '{"loss": 1.0}\n', "can't be read"),
        ("result.json", "[", "can't be read"),
    ],
)
def test_damaged_files_are_told_in_a_line(
    made: Made, capsys: pytest.CaptureFixture[str], file: str, content: str, reason: str
) -> None:
    made.write()
    (made.path / file).write_text(content)
    assert cli.main(["verify", "--run", str(made.path)]) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert len(told.splitlines()) == 1


def test_result_json_may_know_of_steps_that_metrics_do_not(made: Made) -> None:
    (made.path / "result.json").write_text(json.dumps({"progress": {"step": STEPS + 2}}))
    assert made.examine().problems == [f"not in metrics.jsonl: steps {STEPS + 1} to {STEPS + 2}"]


def test_a_reader_of_a_run_changes_nothing(made: Made) -> None:
    made.write()
    before = {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}
    cli.main(["verify", "--run", str(made.path)])
    assert {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()} == before


def test_the_order_itself_is_held_against_the_epoch(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the order to read a pack twice, its fingerprints would agree all the same."""
    from raytune_ds.data.order import Order

    place = Order.place

    def wrong(self: Order, step: int, slot: int) -> Any:
        return place(self, step, 1 if slot == 0 else slot)

    monkeypatch.setattr(Order, "place", wrong)
    order = made.store.order("train", SLOTS, SEED)
    rows = [row(step, step_rows(made.store, order, step).batch) for step in range(1, STEPS + 1)]
    assert made.examine(rows).problems == ["documents of epoch 1 were trained on more or less than once"]
