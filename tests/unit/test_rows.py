"""The rows of any step: slot, file, row and line of each document, and how it begins."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ds import cli
from raytune_ds.compose import dump
from raytune_ds.config import Config
from raytune_ds.data.rows import NAMED_DOCUMENTS, name_rows, origins, step_rows
from raytune_ds.data.store import Store, doc_id
from tests.helpers import write_jsonl
from tests.stores import store_of, write_store

NUM_ROWS = 12


def row(number: int) -> dict[str, str]:
    return {"instruction": f"question {number}?", "output": f"answer {number}"}


def chat(number: int) -> dict[str, Any]:
    roles = (("system", "be brief"), ("user", f"question {number}?"), ("assistant", f"answer {number}"))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def jsonl(path: Path) -> None:
    """With a blank line in front of each row, so that rows and lines differ."""
    path.write_text("".join(f"\n{json.dumps(row(number))}\n" for number in range(NUM_ROWS)))


def gzipped(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(chat(number)) + "\n" for number in range(NUM_ROWS))


def array(path: Path) -> None:
    path.write_text(json.dumps([chat(number) for number in range(NUM_ROWS)], indent=1))


def csv(path: Path) -> None:
    path.write_text("prompt,completion\n" + "".join(f"question {n}?,answer {n}\n" for n in range(NUM_ROWS)))


def txt(path: Path) -> None:
    path.write_text("".join(f"question {number}?\n\n" for number in range(NUM_ROWS)))


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row(number) for number in range(NUM_ROWS)]), path, row_group_size=5)


KINDS = [
    ("a.jsonl", jsonl, "alpaca", lambda number: 2 * number + 2),
    ("b.jsonl.gz", gzipped, "messages", lambda number: number + 1),
    ("c.json", array, "messages", lambda number: 2 + 16 * number),
    ("d.csv", csv, "prompt-completion", lambda number: number + 2),
    ("e.txt", txt, "text", lambda number: 2 * number + 1),
    ("f.parquet", parquet, "alpaca", lambda number: None),
]


@pytest.mark.parametrize(("name", "write", "format", "line"), KINDS)
def test_a_row_of_any_file_is_found_again(
    tmp_path: Path, name: str, write: Any, format: str, line: Any
) -> None:
    (tmp_path / "store").mkdir()
    write(tmp_path / name)
    path = str(tmp_path / name)
    store = store_of(tmp_path / "store", 8, [path], formats=[format])
    found = origins(store, [doc_id(0, number) for number in (0, 4, NUM_ROWS - 1)])
    for number in (0, 4, NUM_ROWS - 1):
        origin = found[doc_id(0, number)]
        assert (origin.file, origin.row, origin.line) == (path, number, line(number))
        assert origin.text == f"question {number}?"
        place = f"{path}, row {number + 1}" + (f", line {line(number)}" if line(number) else "")
        assert str(origin) == place


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text("not json\n" * NUM_ROWS),
        lambda path: path.write_text('{"other": 1}\n' * NUM_ROWS),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text(json.dumps(row(0))),  # it is shorter now
    ],
)
def test_of_a_file_that_is_gone_or_another_file_and_row_are_told(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "store").mkdir()
    file = write_jsonl(tmp_path / "a.jsonl", [row(number) for number in range(NUM_ROWS)])
    store = store_of(tmp_path / "store", 8, [str(file)])
    damage(file)
    origin = origins(store, [doc_id(0, 5)])[doc_id(0, 5)]
    assert (origin.file, origin.row, origin.text) == (str(file), 5, None)
    assert str(origin).startswith(f"{file}, row 6")


def test_a_data_set_of_the_hub_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytune_ds.data import rows

    monkeypatch.setattr(rows, "expand", lambda path: pytest.fail("asked for it"))
    store = store_of(tmp_path, 8, ["org/name"])
    assert str(origins(store, [doc_id(0, 3)])[doc_id(0, 3)]) == "org/name, row 4"


def test_a_large_file_is_not_read_while_training_waits(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    file = write_jsonl(tmp_path / "a.jsonl", [row(number) for number in range(NUM_ROWS)])
    store = store_of(tmp_path / "store", 8, [str(file)])
    size = file.stat().st_size
    assert origins(store, [doc_id(0, 2)], most_bytes=size)[doc_id(0, 2)].line == 3
    assert origins(store, [doc_id(0, 2)], most_bytes=size - 1)[doc_id(0, 2)].line is None


def test_a_step_has_the_documents_of_its_slots(tmp_path: Path) -> None:
    store = store_of(tmp_path, 45)
    order, reader = store.order("train", 8, seed=3), store.reader("train")
    for step in (1, 5, 6):
        found = step_rows(store, order, step).documents
        places = {slot: order.place(step - 1, slot) for slot in range(8)}
        packs = {slot: reader.pack(place) for slot, place in places.items() if place is not None}
        assert [(d.slot, d.doc) for d in found] == [
            (slot, doc) for slot, pack in packs.items() for doc in pack["docs"].tolist()
        ]
        assert [len(d.ids) for d in found] == [
            n + 1 for pack in packs.values() for n in pack["lengths"].tolist()
        ]
        assert all(
            len(set(d.ids.tolist())) == 1 for d in found
        )  # each document of this store is one token, repeated


def test_a_few_rows_are_named_in_words(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", [row(i) for i in range(150)])) for n in ("a", "b")]
    store = store_of(tmp_path / "store", 45, files)
    order = store.order("train", 8, seed=3)
    docs = [document.doc for document in step_rows(store, order, 2).documents]
    text = name_rows(store, order, 2)
    assert text.startswith("its rows: ")
    assert text.count(".jsonl, row ") == text.count(", line ") == NAMED_DOCUMENTS
    assert text.endswith(f" and {len(docs) - NAMED_DOCUMENTS} more")


def test_naming_rows_never_fails(tmp_path: Path) -> None:
    store = store_of(tmp_path, 45)
    for shard in tmp_path.glob("*.parquet"):
        shard.write_bytes(b"")
    assert "can't be read" in name_rows(Store(f"{tmp_path}/", store.manifest), store.order("train", 8, 3), 2)


# ---- the command ----------------------------------------------------------------------------------


def make_run(tmp_path: Path, store: Store, rows: list[dict[str, Any]]) -> Path:
    """A run directory with a checkpoint that names the store."""
    from raytune_ds.catalog import Manifest

    run = tmp_path / "run"
    run.mkdir()
    config = Config(run={"storage": str(tmp_path), "seed": 3}, train={"global_batch": 8, "max_steps": 12})
    (run / "config.json").write_text(dump(config))
    write_jsonl(run / "metrics.jsonl", rows)
    identity = {"data": store.manifest.fingerprint, "run.seed": 3, "train": {"global_batch": 8}}
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(Manifest(1, 1, identity, {}, None, {}, ()).to_json()))
    return run


def test_steps_are_printed_whether_trained_on_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".prepared" / "0123"
    folder.mkdir(parents=True)
    file = write_jsonl(tmp_path / "a.jsonl", [row(number) for number in range(150)])
    store = store_of(folder, 45, [str(file)])
    order = store.order("train", 8, seed=3)
    batches = {step: step_rows(store, order, step).batch for step in range(1, 14)}
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0, "batch": batches[1]},
        {"step": 2, "loss": 1.0, "batch": batches[3]},
        {"step": 3, "left_out": True},
        {"step": 4, "loss": None, "skipped": True, "batch": batches[4]},
    ]
    run = make_run(tmp_path, store, rows)
    steps = [argument for step in (1, 2, 3, 4, 7, 13) for argument in ("--step", str(step))]
    assert cli.main(["data", "--run", str(run), *steps]) == 0
    told = capsys.readouterr().out
    heads = {line.partition(":")[0]: line for line in told.splitlines() if line.startswith("step")}
    assert heads["step 1"].endswith(f"batch {batches[1]}; trained on")
    assert "step 1 of 6 in epoch 1" in heads["step 1"]
    assert heads["step 2"].endswith(f"it was trained on another batch, {batches[3]}")
    assert heads["step 3"].endswith("left out")
    assert heads["step 4"].endswith("read, but not applied")
    assert heads["step 7"].endswith("not trained on yet")
    assert "step 1 of 6 in epoch 2" in heads["step 7"]
    assert heads["step 13"].endswith("the run ends with step 12")
    document = step_rows(store, order, 1).documents[0]
    number = document.doc
    line = f"  slot 0: {file}, row {number + 1}, line {number + 1}, {len(document.ids)} tokens: question {number}?"
    assert line in told.splitlines()


def test_pieces_of_a_long_text_begin_as_they_do(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".prepared" / "0123"
    folder.mkdir(parents=True)
    file = tmp_path / "long.txt"
    file.write_text("a short one\n" + "How many days has a week? " * 20)
    text = tiny_tokenizer("Seven, and 24 hours each")["input_ids"]
    store = write_store(
        folder,
        [[0], [1]],
        [doc_id(0, 1), doc_id(0, 1)],
        [len(text), 9],
        [str(file)],
        ["text"],
        num_split=1,
        tokenizer=str(tiny_models["qwen2"]),
        ids={0: text},
    )
    run = make_run(tmp_path, store, [])
    assert cli.main(["data", "--run", str(run), "--step", "1"]) == 0
    told = capsys.readouterr().out
    assert told.count(f"{file}, row 2, line 2, ") == 2
    assert ": Seven, and 24 hours each" in told
    assert "How many days" not in told


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--run", "here"], "--run and --step go together"),
        (["--step", "1"], "--run and --step go together"),
        (["--run", "here", "--step", "0"], "the first step is 1"),
        (["--run", "here", "--step", "1"], "no run directory"),
        (["--run", "here", "--step", "1", "adapter.r=1"], "leave --config and key=value out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    arguments = [str(tmp_path) if argument == "here" else argument for argument in arguments]
    assert cli.main(["data", *arguments]) == 2
    assert reason in capsys.readouterr().err
