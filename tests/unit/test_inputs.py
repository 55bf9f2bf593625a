"""Which rows an objective takes, and what is said of those that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from raytune_ds.config import DataConfig, ObjectiveConfig, SourceConfig
from raytune_ds.data.formats import FORMATS
from raytune_ds.data.inputs import FOR_NO_OBJECTIVE, TRAINS_ON, Inputs
from raytune_ds.errors import UserError
from tests.helpers import write_jsonl

ALPACA = {"instruction": "question", "output": "answer"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def find(*sources: Path | dict[str, str], held_out: Path | None = None) -> Inputs:
    given = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    evaluation = {"eval": {"sources": str(held_out)}} if held_out else {}
    return Inputs.find(DataConfig.model_validate({"sources": given, **evaluation}))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "raw.txt"
    path.write_text("some text\n")
    return path


def test_every_objective_takes_formats_that_there_are() -> None:
    assert set(TRAINS_ON) == set(get_args(ObjectiveConfig.model_fields["kind"].annotation))
    given = set(get_args(SourceConfig.model_fields["format"].annotation)) - {"auto"}
    assert given == set(FORMATS)
    assert all(set(taken) <= given for taken in TRAINS_ON.values())
    assert {"preference", "kto"} == FOR_NO_OBJECTIVE


def test_sft_takes_any_demonstration(tmp_path: Path, text: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [ALPACA])
    find(rows, text).require_formats_of("sft")


def test_pretrain_takes_raw_text_from_any_file(tmp_path: Path, text: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "some", "url": "x"}])
    both = write_jsonl(tmp_path / "both.jsonl", [{"text": "some", **ALPACA}])
    inputs = find(text, rows, {"path": str(both), "format": "text"}, held_out=text)
    inputs.require_formats_of("pretrain")
    assert not inputs.has_conversations  # so that no chat template is asked for


def test_pretrain_names_each_source_that_is_not_raw_text_and_what_to_do(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        write_jsonl(folder / f"{name}.jsonl", [ALPACA | {"text": "some"}])
    chats = write_jsonl(tmp_path / "chats.jsonl", [CHAT])
    with pytest.raises(UserError) as caught:
        find(text, folder, held_out=chats).require_formats_of("pretrain")
    told = str(caught.value)
    assert told.splitlines()[1:3] == [
        f"data.sources: {folder} has alpaca rows",
        f"data.eval.sources: {chats} has messages rows",
    ]
    assert "raw.txt" not in told
    assert "objective.kind=sft" in told
    assert f"{{path: {folder}, format: text}}" in told


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
LABELLED = {**CHAT, "label": True}


@pytest.mark.parametrize("objective", TRAINS_ON)
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (PAIR, "preference rows (a chosen and a rejected answer each)"),
        (LABELLED, "KTO rows (an answer and whether it is desirable each)"),
    ],
)
def test_judged_rows_are_for_looking_at_and_not_for_training(
    tmp_path: Path, text: Path, row: dict[str, object], kind: str, objective: str
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    inputs = find(text, rows)
    inputs.require_formats_of(objective, to_train=False)
    with pytest.raises(UserError) as caught:
        inputs.require_formats_of(objective)
    told = str(caught.value)
    assert told.splitlines()[1] == f"data.sources: {rows} has {kind}"
    assert "sft trains on demonstrations (a prompt and the one answer to learn), pretrain on raw text" in told
    assert f"{{path: {rows}, format: messages}}" in told
    assert "set objective.kind=sft" not in told  # it would not help


def test_a_column_of_judged_rows_is_trained_on_where_the_format_says_so(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [LABELLED])
    find({"path": str(rows), "format": "messages"}).require_formats_of("sft")


def test_looking_does_not_let_pass_what_another_objective_takes(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [ALPACA])
    with pytest.raises(UserError, match="has alpaca rows"):
        find(rows).require_formats_of("pretrain", to_train=False)


def test_a_tokenizer_is_trained_on_both_answers(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [PAIR])
    assert list(find(rows).sample_texts()) == ["q", "a", "b"]


def test_a_format_that_was_given_is_refused_too(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [ALPACA])
    with pytest.raises(UserError, match="has alpaca rows"):
        find({"path": str(rows), "format": "alpaca"}).require_formats_of("pretrain")


@pytest.mark.parametrize(
    ("most", "read"), [(None, [4, 4, 4]), (3, [3]), (4, [4]), (6, [4, 2]), (11, [4, 4, 3]), (50, [4, 4, 4])]
)
def test_the_first_rows_of_a_source_are_read_over_its_files(
    tmp_path: Path, most: int | None, read: list[int]
) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(4)])
    source = {"path": f"{tmp_path}/*.jsonl", "max_rows": most}
    inputs = Inputs.find(DataConfig.model_validate({"sources": [source, f"{tmp_path}/a.jsonl"]}))
    mine = [item for item in inputs.items if item.source.index == 0]
    assert [len(list(item.rows())) for item in mine] == read
    first = [row.value["text"] for item in mine for row in item.rows() if row.value is not None]
    assert first == [f"{name}{i}" for name in "abc" for i in range(4)][: sum(read)]
    assert [len(list(item.rows())) for item in inputs.items if item.source.index == 1] == [4]
