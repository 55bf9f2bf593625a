"""The packed store: from any rows, in constant memory, the same whatever the parallelism, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.errors import UserError
from tests.helpers import write_jsonl

pytestmark = pytest.mark.usefixtures("ray_session")


def _rows(count: int, words: int = 20) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"question {i} " + "word " * (i % words),
            "output": f"answer {i} " + "text " * (i * 7 % words),
        }
        for i in range(count)
    ]


def _prepare(storage: Path, tiny: Path, *overrides: str) -> Any:
    from raytune_ds.check import check
    from raytune_ds.compose import compose
    from raytune_ds.launch import assign

    config = compose([], [f"run.storage={storage}", f"model.name={tiny}", *overrides])
    return assign(check(config)).store


def _documents(store: Any, split: str) -> list[tuple[int, ...]]:
    """Every packed document as (doc id, tokens ...), sorted."""
    from raytune_ds.data.order import Place

    documents, reader = [], store.reader(split)
    for position in range(store.split(split).num_packs):
        pack = reader.pack(Place(*divmod(position, store.manifest.row_group)))
        start = 0
        for doc, length in zip(pack["docs"].tolist(), pack["lengths"].tolist(), strict=True):
            documents.append((doc, *pack["ids"][start : start + length].tolist()))
            start += length
    return sorted(documents)


@pytest.fixture(scope="module")
def tiny(tiny_models: dict[str, Path]) -> Path:
    """Any tiny model: only its tokenizer counts here."""
    return tiny_models["qwen2"]


def test_every_row_once_and_the_same_in_any_split_of_the_work(tmp_path: Path, tiny: Path) -> None:
    """One file and one bucket against the same file in many buckets: the same documents, held out the same."""
    data = write_jsonl(tmp_path / "rows.jsonl", _rows(16_000))
    settings = (f"data.sources={data}", "data.seq_len=256", "data.eval.fraction=0.05")
    one = _prepare(tmp_path / "one", tiny, *settings, "data.prepare_memory_mib=64")
    many = _prepare(tmp_path / "many", tiny, *settings, "data.prepare_memory_mib=1")
    assert len(many.manifest.train.shards) > len(one.manifest.train.shards)
    for split in ("train", "eval"):
        documents = _documents(one, split)
        assert documents == _documents(many, split)
        assert len(documents) == one.split(split).num_docs
    assert one.manifest.train.num_docs + one.manifest.eval.num_docs == 16_000
    assert 0.04 < one.manifest.eval.num_docs / 16_000 < 0.06
    full = one.manifest.train.num_tokens / (one.manifest.train.num_packs * 256)
    assert full > 0.98


def test_memory_does_not_grow_with_the_data(tmp_path: Path, tiny: Path) -> None:
    """Ten times the rows: the tasks' peak memory rises by less than a fifth."""
    peaks = []
    for count in (5_000, 50_000):
        data = write_jsonl(tmp_path / f"{count}.jsonl", _rows(count, words=60))
        store = _prepare(tmp_path / "store", tiny, f"data.sources={data}", "data.prepare_memory_mib=1")
        assert store.manifest.num_rows == count
        peaks.append(json.loads((Path(store.path) / "making.json").read_text())["peak_memory_mib"])
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_prepared_once(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reused when nothing changed, wherever the file lies; made anew when a row, the length or the template changes."""
    data = write_jsonl(tmp_path / "rows.jsonl", _rows(50))
    moved = write_jsonl(tmp_path / "moved.jsonl", _rows(50))
    store = _prepare(tmp_path, tiny, f"data.sources={data}")
    capsys.readouterr()
    again = _prepare(tmp_path, tiny, f"data.sources={moved}")
    assert again.path == store.path
    assert again.manifest.files == (str(moved),)
    assert (set(again.manifest.train.sources), again.manifest.sources) == ({"moved"}, ("moved",))
    assert "prepared before" in capsys.readouterr().out
    changed = write_jsonl(tmp_path / "changed.jsonl", _rows(51))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}")
    others = [
        _prepare(tmp_path, tiny, *settings).path
        for settings in (
            (f"data.sources={changed}",),
            (f"data.sources={data}", "data.seq_len=1024"),
            (f"data.sources={data}", f"data.chat_template={template}"),
        )
    ]
    assert len({store.path, *others}) == 4


BAD = (
    {"instruction": "fine", "output": "good"},
    {"instruction": "no answer", "output": ""},
    {"instruction": "no output key"},
)


def test_bad_rows_stop_the_run_by_name(tmp_path: Path, tiny: Path) -> None:
    """File, row, line and reason of each; what to do."""
    data = write_jsonl(tmp_path / "bad.jsonl", [*BAD])
    with data.open("a") as file:
        file.write('{"instruction": broken\n')
    with pytest.raises(UserError) as caught:
        _prepare(tmp_path, tiny, f"data.sources={data}")
    text = str(caught.value)
    assert f"{data}, row 2, line 2:" in text
    assert "bad.jsonl, row 3, line 3:" in text
    assert "line 4" in text
    assert "malformed JSON" in text
    assert "data.on_bad_row=skip" in text


def test_bad_rows_are_skipped_and_listed(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason for each goes to a file that is named."""
    data = write_jsonl(tmp_path / "bad.jsonl", [*BAD, *_rows(10)])
    store = _prepare(tmp_path, tiny, f"data.sources={data}", "data.on_bad_row=skip")
    rejected = [json.loads(line) for line in (Path(store.path) / "rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["line"]) for row in rejected] == [(2, 2), (3, 3)]
    assert all(row["reason"] and row["file"] == str(data) for row in rejected)
    assert store.manifest.num_rejected == 2
    assert "rejected.jsonl" in capsys.readouterr().out


def test_long_rows_are_cut_dropped_or_split(tmp_path: Path, tiny: Path) -> None:
    """Counted each way; an answer that is cut off whole is never trained on as nothing."""
    long_answer = {"instruction": "short", "output": "long " * 200}
    long_question = {"instruction": "long " * 200, "output": "short"}
    data = write_jsonl(tmp_path / "long.jsonl", [long_answer, long_question, *_rows(5, words=3)])
    settings = (f"data.sources={data}", "data.seq_len=64", "data.eval.fraction=0")
    cut = _prepare(tmp_path, tiny, *settings).manifest
    assert (cut.num_truncated, cut.num_dropped_long, cut.train.num_docs) == (1, 1, 6)
    dropped = _prepare(tmp_path, tiny, *settings, "data.on_long_row=drop").manifest
    assert (dropped.num_truncated, dropped.num_dropped_long, dropped.train.num_docs) == (0, 2, 5)
    text = tmp_path / "long.txt"
    text.write_text("many words " * 300 + "\n")
    split = _prepare(
        tmp_path, tiny, f"data.sources={text}", "data.seq_len=64", "data.eval.fraction=0"
    ).manifest
    assert split.num_truncated == split.num_dropped_long == 0
    assert (split.num_split, cut.num_split) == (1, 0)
    assert split.train.num_supervised == split.train.num_tokens > 300


def test_nothing_left_is_an_error(tmp_path: Path, tiny: Path) -> None:
    """A run on nothing would end with a loss of zero and look fine."""
    data = write_jsonl(tmp_path / "q.jsonl", [{"instruction": "long " * 200, "output": "x"}] * 3)
    with pytest.raises(UserError, match=r"none is left to train on.*seq_len = 64"):
        _prepare(tmp_path, tiny, f"data.sources={data}", "data.seq_len=64")


def test_conversations_need_a_chat_template(tmp_path: Path, tiny: Path) -> None:
    """A base model without one is told what to do; raw text does without."""
    import shutil

    model = tmp_path / "base"
    shutil.copytree(tiny, model)
    (model / "chat_template.jinja").unlink()
    data = write_jsonl(tmp_path / "rows.jsonl", _rows(5))
    with pytest.raises(UserError, match=r"no chat template[\s\S]*data\.chat_template"):
        _prepare(tmp_path, model, f"data.sources={data}")
    (tmp_path / "raw.txt").write_text("some text\nand more\n")
    for objective in ("sft", "pretrain"):
        store = _prepare(
            tmp_path, model, f"data.sources={tmp_path / 'raw.txt'}", f"objective.kind={objective}"
        )
        assert store.manifest.train.num_packs == 1


def test_pretrain_takes_raw_text_only_and_shares_its_store_with_sft(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tokens and weights, so nothing is prepared twice; what is not raw text is refused before that."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"text": "a text"} for row in _rows(5)])
    with pytest.raises(UserError, match=r"pretrain[\s\S]*rows\.jsonl has alpaca rows"):
        _prepare(tmp_path, tiny, f"data.sources={rows}", "objective.kind=pretrain")
    assert not (tmp_path / ".prepared").exists()
    sources = f"data.sources={{path: {rows}, format: text}}"
    pretrain = _prepare(tmp_path, tiny, sources, "objective.kind=pretrain")
    assert pretrain.manifest.train.num_supervised == pretrain.manifest.train.num_tokens
    capsys.readouterr()
    assert _prepare(tmp_path, tiny, sources, "objective.kind=sft").path == pretrain.path
    assert "prepared before" in capsys.readouterr().out


def test_a_source_of_one_row_is_trained_on_and_one_of_none_is_an_error(tmp_path: Path, tiny: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", _rows(50))
    single = write_jsonl(tmp_path / "single.jsonl", [{"instruction": "Who are you?", "output": "A model."}])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "no answer", "output": ""}])
    mixed = f"{{path: {rows}, weight: 1}}, {{path: {{}}, weight: 1, epochs: 5}}"
    settings = ("data.eval.fraction=0.1", "data.on_bad_row=skip")
    sources = f"data.sources=[{mixed}]"
    store = _prepare(tmp_path, tiny, sources.replace("{}", str(single)), *settings)
    assert {name: part.num_docs for name, part in store.manifest.train.sources.items()} == {
        "rows": 5,
        "single": 5,
    }
    assert set(store.manifest.eval.sources) == {"rows"}
    with pytest.raises(UserError, match=r"bad\.jsonl: no row is left to train on"):
        _prepare(tmp_path, tiny, sources.replace("{}", str(bad)), *settings)
