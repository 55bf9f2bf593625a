"""Rows of files and of a store, as they are measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.compose import compose
from raytune_ds.data.order import Place
from raytune_ds.errors import UserError
from raytune_ds.evaluation.datasets import SPARE_TOKENS, from_file, held_out
from raytune_ds.evaluation.items import TokenSequence
from tests.helpers import write_jsonl
from tests.runs import finished_run
from tests.stores import write_store

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"instruction": "How many days has a week?", "output": "Seven"},
    {"instruction": "名词解释：适配器", "output": "一小组可以单独训练的参数"},
    {"instruction": "What does this word mean?", "output": "It means that somebody asked a question."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A finished adapter run; tests that write to it copy it."""
    return finished_run(tmp_path_factory.mktemp("storage"), tiny_models["qwen2"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def read(path: Path, run: Path, *overrides: str, **how: Any) -> Any:
    """The data set of a file, as a run with these settings renders it."""
    from transformers import AutoTokenizer

    config = compose([], ["data.seq_len=128", *overrides])
    told = {"limit": None, "max_new_tokens": None, **how}
    return from_file(str(path), "data", config, AutoTokenizer.from_pretrained(run / "final"), **told)


def test_rows_are_rendered_as_in_training(run: Path, rows: Path) -> None:
    from transformers import AutoTokenizer

    data = read(rows, run)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert data.name == "rows.jsonl"
    assert [item.expected for item in data.items] == [row["output"] for row in ROWS]
    for item, row in zip(data.items, ROWS, strict=True):
        messages = [{"role": "user", "content": row["instruction"]}]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert item.prompt == served
        (one,) = item.sequences
        assert one.ids[: len(served)] == served
        assert one.weights == [0.0] * len(served) + [1.0] * (len(one.ids) - len(served))
    longest = max(sum(map(bool, item.sequences[0].weights)) for item in data.items)
    assert {item.max_new_tokens for item in data.items} == {longest + SPARE_TOKENS}
    assert data.ends == {tokenizer.eos_token_id}


def test_formats_and_limits(tmp_path: Path, run: Path) -> None:
    talk = {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "b?"},
            {"role": "assistant", "content": "second"},
        ]
    }
    data = read(write_jsonl(tmp_path / "talk.jsonl", [talk] * 3), run, limit=2)
    assert [item.expected for item in data.items] == ["second"] * 2
    assert sum(map(bool, data.items[0].sequences[0].weights)) > 2, "both answers are in the loss"
    assert data.prompts[0] == tuple(talk["messages"][:3])
    text = tmp_path / "book.txt"
    text.write_text("Once upon a time.\nThe end.\n")
    assert [item.prompt for item in read(text, run).items] == [[], []], "raw text has a loss and no answer"
    judged = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    preferred = read(write_jsonl(tmp_path / "pairs.jsonl", [judged]), run)
    assert [(item.expected, len(item.sequences)) for item in preferred.items] == [("yes", 1)]


def test_a_row_that_cannot_be_rendered_is_told_of_and_left_out(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"instruction": "word " * 300, "output": "never read"}
    data = read(write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], long, ROWS[1]]), run)
    assert [item.expected for item in data.items] == [ROWS[0]["output"], ROWS[1]["output"]]
    assert data.places[1].endswith("row 3, line 3")
    (reason,) = data.unfit
    assert "row 2, line 2" in reason
    assert "data.seq_len = 128" in reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "no row in it"),
        ('{"instruction": "a?"}\n', "the format of the rows is not known"),
        (
            '{"instruction": "a?", "output": "b"}\n{"instruction": "a?"}\n',
            "row 2, line 2: the row has no 'output'",
        ),
        ('{"instruction": "a?", "output": "b"}\nnot json\n', "row 2, line 2: malformed JSON"),
        (json.dumps({"instruction": "word " * 300, "output": "b"}), "no row that can be measured"),
    ],
)
def test_files_that_cannot_be_measured_on(tmp_path: Path, run: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path, run)
    assert "bad.jsonl" in str(caught.value)


def test_bad_rows_are_left_out_where_the_run_left_them_out(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nnot json\n")
    data = read(path, run, "data.on_bad_row=skip")
    assert len(data.items) == 1
    assert "malformed JSON" in data.unfit[0]


def test_the_held_out_split_gives_back_its_documents(tmp_path: Path) -> None:
    """Two packs of documents; those of one row belong together, and their order is the store's."""
    store = write_store(tmp_path, [[2, 0], [1]], [7, 7, 3], [5, 4, 3], ids={0: [1, 2, 3, 4, 5], 2: [6, 7, 8]})
    store = replace(store, manifest=replace(store.manifest, eval=store.manifest.train))
    data = held_out(store, None)
    assert [place.rpartition(", ")[2] for place in data.places] == ["row 4", "row 8"]
    assert data.items[0].sequences == [TokenSequence([6, 7, 8], [0.0, 1.0, 1.0])]
    assert [s.ids for s in data.items[1].sequences] == [[1, 2, 3, 4, 5], [2, 2, 2, 2]]
    assert [place.rpartition(", ")[2] for place in held_out(store, 1).places] == ["row 4"]
    pack = store.reader("train").pack(Place(0, 0))
    assert pack["weights"].sum() == sum(
        sum(s.weights) for s in data.items[0].sequences + data.items[1].sequences[:1]
    )
