"""What `raytune-ds data` prints of a store: raw text and conversations each as it makes sense for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytune_ds.data.labels import Label
from raytune_ds.data.show import TEXT_ENDS, show
from raytune_ds.data.store import Manifest, Split, Store, doc_id, pack_documents
from raytune_ds.data.thinking import KEPT, NONE
from raytune_ds.data.tokenizer import TokenizerSpec
from tests.stores import DOCUMENTS, write_table

SEQ_LEN = 400


def shown(
    folder: Path,
    model: Path,
    documents: list[list[int]],
    format: str,
    capsys: pytest.CaptureFixture[str],
    labels: Sequence[Label] = (Label.PLAIN,),
    reasoning: dict[str, int] | None = None,
) -> str:
    """The output for a store of one pack; the first two tokens of each document are context."""
    columns: dict[str, Any] = {
        "ids": documents,
        "weights": [[0.0] * 2 + [1.0] * (len(ids) - 2) for ids in documents],
        "doc": [doc_id(0, 6)] * len(documents),
        "label": labels,
    }
    packs = pack_documents([range(len(documents))], pa.table(columns, schema=DOCUMENTS))
    write_table(packs, f"{folder}/train-last.parquet")
    num_tokens = sum(map(len, documents)) - len(documents)
    train = Split((("train-last.parquet", 1),), 1, len(documents), num_tokens, num_tokens - len(documents))
    manifest = Manifest(
        fingerprint="",
        seq_len=SEQ_LEN,
        train=train,
        eval=Split(),
        files=("rows.jsonl",),
        formats={"rows.jsonl": format},
        tokenizer=str(model),
        num_rows=20,
        num_rejected=0,
        rejected_reasons={},
        num_truncated=0 if format == "text" else 3,
        num_dropped_long=0,
        length_histogram={"512": 20},
        num_split=5 if format == "text" else 0,
        reasoning=reasoning or {},
    )
    show(Store(str(folder), manifest), TokenizerSpec(str(model)), 1)
    return capsys.readouterr().out


def test_raw_text(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Split, not cut; of a long one the beginning and the end, as all between is trained on too."""
    ids = tiny_tokenizer("word" + " 7" * 300)["input_ids"][:301]
    told = shown(tmp_path, tiny_models["qwen2"], [ids], "text", capsys)
    assert f"split into documents of {SEQ_LEN} tokens 5 (25.0%)" in told
    assert "truncated" not in told
    assert "dropped" not in told
    assert "tokens a document, before it is split" in told
    assert "rows.jsonl, row 7" in told
    *_, begin, middle, end = told.splitlines()
    assert middle == f"... {301 - 2 * TEXT_ENDS} more tokens, all trained on ..."
    assert begin == tiny_tokenizer.decode(ids[:2]) + f"«{tiny_tokenizer.decode(ids[2:TEXT_ENDS])}»"
    assert end == f"«{tiny_tokenizer.decode(ids[-TEXT_ENDS:])}»"


def test_a_short_raw_text_is_shown_whole(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tiny_tokenizer("7" * 2 * TEXT_ENDS)["input_ids"]
    assert len(ids) == 2 * TEXT_ENDS
    told = shown(tmp_path, tiny_models["qwen2"], [ids], "text", capsys)
    assert told.splitlines()[-1].replace("«", "").replace("»", "") == tiny_tokenizer.decode(ids)


def test_a_conversation_is_shown_whole(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tiny_tokenizer("7" * 300)["input_ids"]
    told = shown(tmp_path, tiny_models["qwen2"], [ids], "alpaca", capsys)
    assert f"truncated to {SEQ_LEN} tokens 3 (15.0%), dropped as too long 0 (0.0%)" in told
    assert "split" not in told.partition("examples")[0].replace("split ", "", 1)
    assert told.splitlines()[-1] == "77«" + "7" * 298 + "»"


def test_a_pair_is_shown_as_a_pair(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the pair that the pack begins with, as only one document is shown of a pack."""
    documents = [tiny_tokenizer(text)["input_ids"] for text in ("7" * 9, "7788", "9999", "8888")]
    labels = [Label.CHOSEN, Label.REJECTED] * 2
    told = shown(tmp_path, tiny_models["qwen2"], documents, "preference", capsys, labels)
    heading = told.splitlines().index("rows.jsonl, row 7")
    assert told.splitlines()[heading + 1 :] == ["chosen:", "77«7777777»", "rejected:", "77«88»"]


@pytest.mark.parametrize("label", [Label.DESIRABLE, Label.UNDESIRABLE])
def test_a_labelled_answer_is_shown_with_its_label(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    label: Label,
) -> None:
    ids = tiny_tokenizer("7788")["input_ids"]
    told = shown(tmp_path, tiny_models["qwen2"], [ids], "kto", capsys, [label])
    assert told.splitlines()[-2:] == [f"{label.name.lower()}:", "77«88»"]


def test_a_conversation_has_no_label(
    tmp_path: Path, tiny_models: dict[str, Path], tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tiny_tokenizer("7788")["input_ids"]
    told = shown(tmp_path, tiny_models["qwen2"], [ids], "alpaca", capsys)
    assert told.splitlines()[-2:] == ["rows.jsonl, row 7", "77«88»"]


def test_what_became_of_reasoning_is_told_where_there_is_any(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {KEPT: 1200, NONE: 300}
    told = shown(tmp_path, tiny_models["qwen2"], [[5, 6, 7]], "messages", capsys, reasoning=counts)
    assert "answers: 1,200 with reasoning; 300 without reasoning" in told.splitlines()
    told = shown(tmp_path, tiny_models["qwen2"], [[5, 6, 7]], "messages", capsys, reasoning={NONE: 300})
    assert "answers:" not in told
