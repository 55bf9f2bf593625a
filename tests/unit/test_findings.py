"""What is wrong with rows is found: each kind planted in real rows, under real templates, through the real tasks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ds.config import DataConfig
from raytune_ds.data import duplicates
from raytune_ds.data.duplicates import Doubles, find_doubles
from raytune_ds.data.findings import KINDS, Finding, in_order, of_lengths, of_writing, percent
from raytune_ds.data.gate import conclude, described, require_sound
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.job import Job, Tally
from raytune_ds.data.scatter import encode_chunks, read_chunks
from raytune_ds.data.store import Manifest, Split, Store
from raytune_ds.data.tokenizer import TokenizerSpec
from raytune_ds.errors import UserError
from raytune_ds.model.tiny import BOS, EOS
from tests.helpers import write_jsonl

GOOD = 40
CLEAN = "{{ bos_token }}{% for m in messages %}"
CLEAN += "{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}{{ m.content }}"
CLEAN += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
CLEAN += "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"


def good_rows(count: int = GOOD) -> list[dict[str, Any]]:
    """Rows with nothing odd about them, each about something else."""
    words = "river stone cloud lamp bread glass horse paper wheel salt".split()
    rng = np.random.default_rng(0)
    return [
        {
            "instruction": " ".join(rng.choice(words, 12)) + f" {i}?",
            "output": " ".join(rng.choice(words, 14)) + ".",
        }
        for i in range(count)
    ]


class Prepared:
    """Rows taken through the tasks of a preparation, without Ray."""

    def __init__(self, folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> None:
        template = changes.pop("template", None)
        held_out = changes.pop("held_out", ())
        data = write_jsonl(folder / "rows.jsonl", rows)
        found = Inputs.find(DataConfig.model_validate({"sources": str(data)}))
        job = Job(
            **{
                "inputs": found.items,
                "sources": found.sources,
                "tokenizer": TokenizerSpec(str(model), template),
                "seq_len": 512,
                "on_long_row": "truncate",
                "last_turn_only": False,
                "thinking": "auto",
                "seed": 0,
                "num_buckets": 3,
                "chunk_chars": 1000,
                "scratch": str(folder / "scratch"),
                "target": "",
            }
            | changes
        )
        self.tally = Tally()
        for task in read_chunks([0], job, frozenset(), 1 << 20):
            for _, tally in encode_chunks(task, job):
                self.tally.add(tally)
        threshold = self._threshold(job, held_out)
        doubles = Doubles.of(find_doubles(bucket, job, (threshold,)) for bucket in range(job.num_buckets))
        self.findings = {finding.kind: finding for finding in conclude(self.tally, doubles)}
        self.file = str(data)

    def _threshold(self, job: Job, held_out: tuple[int, ...]) -> int:
        """What holds out these rows, and whichever others have lower keys."""
        from raytune_ds.data.scatter import _keys

        return max((_keys(job, 0, row)[1] for row in held_out), default=0)

    def store(self) -> Store:
        findings = tuple(in_order(list(self.findings.values())))
        manifest = Manifest(
            "", 512, Split(), Split(), (self.file,), {}, "", 1, 0, {}, 0, 0, {}, findings=findings
        )
        return Store("", Manifest.from_json(manifest.to_json()))


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> Path:
    """Any tiny model: only its tokenizer counts here."""
    return tiny_models["qwen2"]


def test_good_rows_have_no_finding(tmp_path: Path, model: Path) -> None:
    assert Prepared(tmp_path, model, good_rows()).findings == {}
    assert Prepared(tmp_path, model, good_rows(), template=CLEAN).findings == {}


def answered(content: str, asked: str = "What is said here?") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": content}]}


ODD: dict[str, dict[str, Any]] = {
    "control-text": {"instruction": f"What is {EOS} for?", "output": "It ends an answer."},
    "damaged-text": {"instruction": "Qu’est-ce que c’est ?", "output": "Câ€™est une caf\u00c3\u00a9tiÃ¨re."},
    "other-writing": {
        "instruction": "今天天气怎么样？请你告诉我吧。",
        "output": "今天天气很好，适合出去走走。",
    },
    "answer-in-other-writing": {"instruction": "What is the weather like today?", "output": "今天天气很好。"},
    "cut-off": {"instruction": "Count to a thousand, please.", "output": " ".join(map(str, range(1000)))},
    "too-long": {"instruction": " ".join(map(str, range(1000))), "output": "Those are numbers."},
    "reasoning-unbalanced": {"instruction": "Think, then say it.", "output": "<think>Well, it is said here"},
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_row_is_found_and_named(tmp_path: Path, model: Path, kind: str) -> None:
    found = Prepared(tmp_path, model, [*good_rows(), ODD[kind]]).findings
    finding = found[kind]
    assert (finding.count, finding.of, finding.rows) == (1, GOOD + 1, (GOOD,))
    assert set(found) - {kind} <= {"far-out"}
    assert not finding.stops


DOUBLE = CLEAN.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")


def test_a_broken_template_stops_the_run(tmp_path: Path, model: Path) -> None:
    prepared = Prepared(tmp_path, model, good_rows(), template=DOUBLE)
    finding = prepared.findings["double-bos"]
    assert finding.share == 1
    assert finding.stops
    with pytest.raises(UserError) as caught:
        require_sound(prepared.store(), "fail")
    told = str(caught.value)
    assert f"{prepared.file}, row 1" in told
    assert KINDS["double-bos"].says in told
    assert "data.on_finding=warn" in told


def test_a_template_that_changes_answers_is_not_asked_for_them(tmp_path: Path, model: Path) -> None:
    changing = CLEAN.replace("{{ m.content }}", "{{ m.content | replace('s', 'z') }}")
    assert Prepared(tmp_path, model, good_rows(), template=changing).findings == {}


def test_a_tokenizer_that_changes_answers_stops_the_run(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from tokenizers.normalizers import Lowercase
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["deepseek-v3"])
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(tmp_path / "lower")
    rows = [{**row, "output": row["output"].capitalize()} for row in good_rows()]
    found = Prepared(tmp_path, tmp_path / "lower", rows).findings
    assert found["answer-changed"].count == GOOD
    assert found["answer-changed"].stops


def test_an_answer_without_an_end_stops_the_run(tmp_path: Path, model: Path, tiny_tokenizer: Any) -> None:
    """A tokenizer that has none, under a template that puts none."""
    endless = tmp_path / "endless"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    tokenizer.chat_template = CLEAN.replace("{{ eos_token }}", "")
    tokenizer.save_pretrained(endless)
    found = Prepared(tmp_path, endless, good_rows()).findings
    assert found["no-end-token"].count == GOOD
    assert found["no-end-token"].stops


def test_a_question_that_is_trained_on_is_found(tmp_path: Path, model: Path) -> None:
    bare = "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}"
    found = Prepared(tmp_path, model, good_rows(), template=bare).findings
    assert found["all-supervised"].count == GOOD
    assert found["all-supervised"].stops


def test_reasoning_that_the_prompt_bars_is_found_unless_it_is_meant_to_go(
    tmp_path: Path, model: Path
) -> None:
    closed = CLEAN.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜></think>' }}")
    rows = [answered(f"<think>It is number {i}, I think</think>Number {i}.", f"{i}?") for i in range(9)]
    found = Prepared(tmp_path, model, rows, template=closed).findings
    assert found["reasoning-lost"].stops
    meant = Prepared(tmp_path, model, rows, template=closed, thinking="drop", scratch=str(tmp_path / "b"))
    assert "reasoning-lost" not in meant.findings


def test_text_with_control_tokens_is_found(tmp_path: Path, model: Path) -> None:
    rows = [{"text": row["output"]} for row in good_rows()]
    found = Prepared(tmp_path, model, [*rows, {"text": f"One text.{EOS}{BOS}Another one."}]).findings
    assert found["control-token"].rows == (GOOD,)


def test_rows_that_come_twice_are_found_in_what_is_trained_on_and_across(tmp_path: Path, model: Path) -> None:
    """Equal and nearly equal ones, each beside the first that is trained on."""
    rows = good_rows()
    long = {
        "instruction": "Tell me of it.",
        "output": " ".join(f"{i} {row['output']}" for i, row in enumerate(rows[:6])),
    }
    near = {**long, "output": long["output"].replace("stone", "stones", 2)}
    rows = [*rows, long, rows[3], near, rows[3]]
    found = Prepared(tmp_path, model, rows).findings
    assert set(found) <= {"duplicates", "near-duplicates", "far-out"}
    assert (found["duplicates"].count, found["duplicates"].of) == (2, len(rows))
    assert found["duplicates"].rows == (GOOD + 1, GOOD + 3)
    assert found["duplicates"].others == (3, 3)
    assert (found["near-duplicates"].rows, found["near-duplicates"].others) == ((GOOD + 2,), (GOOD,))
    lines = list(described(found["near-duplicates"], Prepared(tmp_path, model, rows).store()))
    assert lines[1] == f"  {tmp_path}/rows.jsonl, row {GOOD + 3}, like {tmp_path}/rows.jsonl, row {GOOD + 1}"


def test_rows_that_share_a_mark_are_compared(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one of eight bands says is not enough."""
    monkeypatch.setattr(duplicates, "ALIKE", 1.01)
    text = " ".join(row["output"] for row in good_rows()[:6])
    rows = [*good_rows(), answered(text), answered(text.replace("stone", "stones", 1))]
    assert "near-duplicates" not in Prepared(tmp_path, model, rows[GOOD:]).findings


def test_rows_that_are_all_held_out_are_no_duplicates(tmp_path: Path, model: Path) -> None:
    rows = [*good_rows(4), *good_rows(4)]
    assert Prepared(tmp_path, model, rows, held_out=tuple(range(8))).findings == {}


def test_what_is_held_out_and_trained_on_is_found(tmp_path: Path, model: Path) -> None:
    rows = good_rows()
    rows += rows[:20]
    found = Prepared(tmp_path, model, rows, held_out=(25,)).findings
    leaked = found["leaked"]
    assert leaked.count <= leaked.of < len(rows)
    assert 25 in leaked.rows or leaked.count > len(leaked.rows)
    assert leaked.of + found["duplicates"].of == len(rows)


# ---- figures ---------------------------------------------------------------------------------------


def test_rows_in_a_second_script_are_few_or_nothing_is_said() -> None:
    assert list(of_writing({"Latin": 9, "": 3}, {})) == []
    (found,) = of_writing({"Latin": 90, "Chinese": 9, "Thai": 1, "": 3}, {"Chinese": [7, 8, 9], "Thai": [2]})
    assert (found.count, found.of, found.rows) == (10, 100, (2, 7, 8))
    assert found.detail == "Latin 90.0%, Chinese 9.0%, Thai 1.0%"


def test_only_what_is_far_longer_than_the_median_is_far_out() -> None:
    assert list(of_lengths({128: 10, 2048: 3}, [[2000, 5]])) == []
    (found,) = of_lengths({128: 10, 2048: 3, 4096: 1}, [[4000, 5], [2000, 6]])
    assert (found.count, found.of, found.rows) == (1, 14, (5,))
    assert list(of_lengths({}, [])) == []


def test_what_stops_comes_first_and_a_share_is_never_rounded_to_nothing() -> None:
    found = [Finding("duplicates", 1, 3000), Finding("double-bos", 1, 2), Finding("all-supervised", 1, 3)]
    assert [finding.kind for finding in in_order(found)] == ["double-bos", "all-supervised", "duplicates"]
    assert [percent(share) for share in (0, 1 / 3000, 0.0126, 1)] == ["0.0%", "<0.1%", "1.3%", "100.0%"]


def test_what_is_not_grave_is_a_warning(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*good_rows(), ODD["control-text"]]
    store = Prepared(tmp_path, model, rows).store()
    require_sound(store, "fail")
    told = capsys.readouterr().err
    assert KINDS["control-text"].says in told
    assert f"rows.jsonl, row {GOOD + 1}" in told
    broken = Prepared(tmp_path, model, good_rows(), template=DOUBLE, scratch=str(tmp_path / "b")).store()
    require_sound(broken, "warn")
    assert KINDS["double-bos"].says in capsys.readouterr().err


def test_every_kind_that_is_counted_is_known(tmp_path: Path, model: Path) -> None:
    found = Prepared(tmp_path, model, [*good_rows(), *ODD.values()])
    assert set(found.findings) <= set(KINDS)
    assert json.loads(found.store().manifest.to_json())["findings"]
