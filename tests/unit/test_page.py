"""The page of a prepared store: all figures, and examples in which each token is told from its neighbours."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ds import cli, storage
from raytune_ds.data import page, sample
from raytune_ds.data.findings import Finding
from raytune_ds.data.labels import Label
from raytune_ds.data.page import page_of, write_page
from raytune_ds.data.sample import spread
from raytune_ds.data.spelled import BROKEN, visible
from raytune_ds.data.store import ROW_GROUP, Store, doc_id
from raytune_ds.data.thinking import KEPT
from raytune_ds.data.tokenizer import TokenizerSpec
from tests.pages import EVIL, SEQ_LEN, TEXTS, Doc, doc_of, store_of


class Page(HTMLParser):
    """What a browser would make of it.

    Attributes:
        tags: each with its attributes.
        text: outside of the style.
        sections: the text of each by its id.
        sequences: the tokens of each box: tag, attributes, text.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.sections: dict[str, str] = {"": ""}
        self.sequences: list[list[tuple[str, dict[str, str | None], str]]] = []
        self._open: list[str] = []
        self._depth = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag in ("meta", "br"):
            return
        self._open.append(tag)
        if tag == "section":
            self.sections[str(found["id"])] = ""
        if "tokens" in str(found.get("class")).split():
            self.sequences.append([])
            self._depth = len(self._open)
        elif self._depth and len(self._open) == self._depth + 1:
            self.sequences[-1].append((tag, found, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if len(self._open) < self._depth:
            self._depth = 0

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.text += data
        self.sections[list(self.sections)[-1]] += data
        if self._depth:
            assert len(self._open) > self._depth, f"{data!r} stands between tokens"
            tag, attributes, before = self.sequences[-1][-1]
            self.sequences[-1][-1] = (tag, attributes, before + data)

    def rows(self, section: str) -> list[str]:
        """The lines of a section."""
        lines = (" ".join(line.split()) for line in self.sections[section].splitlines())
        return [line for line in lines if line]


def read(store: Store, tokenizer: Any, command: str = "raytune-ds data", config: str = "{}") -> Page:
    """The page of a store."""
    return Page(page_of(store, tokenizer, command, config))


def weights_shown(sequence: list[tuple[str, dict[str, str | None], str]]) -> list[tuple[str, str]]:
    """The tag of each token, and what is said when it is pointed at."""
    return [(tag, str(attributes["title"])) for tag, attributes, _ in sequence]


# -------------------------------------------------------------------------------------------------- examples


@given(prompt=TEXTS, answer=TEXTS)
@settings(max_examples=60, deadline=None)
def test_each_token_is_an_element_and_nothing_else_is(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, prompt: str, answer: str
) -> None:
    """In the right colour, whatever is in the texts; the elements of the page are the same as ever."""
    doc = doc_of(tiny_tokenizer, f"Q{prompt}", f"A{answer}", row=6)
    found = read(store_of(tmp_path_factory.mktemp("store"), [[doc]]), tiny_tokenizer)
    (sequence,) = found.sequences
    assert weights_shown(sequence) == [
        ("mark" if weight else "span", f"id {token}, weight {weight:g}")
        for token, weight in zip(doc.ids, doc.weights, strict=True)
    ]
    if BROKEN not in prompt + answer:
        assert "".join(text for *_, text in sequence) == visible(tiny_tokenizer.decode(doc.ids))
    assert {tag for tag, _ in found.tags} <= KNOWN
    assert not any(attributes.keys() - {"class", "title"} for tag, attributes, _ in sequence)


KNOWN = set(
    "html head meta title style body header main section h1 h2 h3 div strong br span dl dt dd code p ul li table thead"
    " tbody tr th td details summary b mark i pre".split()
)


def test_an_example_says_where_it_is_from(tmp_path: Path, tiny_tokenizer: Any) -> None:
    doc = doc_of(tiny_tokenizer, "one two", "three", row=41)
    found = read(store_of(tmp_path, [[doc]]), tiny_tokenizer)
    share = f"{100 * sum(doc.weights) / (len(doc.ids) - 1):.1f}%"
    assert "news · /data/news.jsonl, row 42" in found.rows("examples")
    assert f"{len(doc.ids)} tokens, {share} trained on" in found.rows("examples")


def test_a_weight_between_is_shown_as_it_is(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (sequence,) = read(store_of(tmp_path, [[Doc([5, 6, 7], [0.0, 0.5, 0.0])]]), tiny_tokenizer).sequences
    assert weights_shown(sequence) == [
        ("span", "id 5, weight 0"),
        ("mark", "id 6, weight 0.5"),
        ("span", "id 7, weight 0"),
    ]


def test_both_answers_of_a_pair_are_one_example(tmp_path: Path, tiny_tokenizer: Any) -> None:
    pair = [
        doc_of(tiny_tokenizer, "question", answer, row=3, label=label)
        for answer, label in (("good", Label.CHOSEN), ("bad", Label.REJECTED))
    ]
    labelled = doc_of(tiny_tokenizer, "question", "so", row=4, label=Label.UNDESIRABLE)
    found = read(store_of(tmp_path, [[*pair, labelled]]), tiny_tokenizer)
    told = [row for row in found.rows("examples") if "row" in row or row.endswith(("chosen", "ed", "able"))]
    assert told == [
        "news · /data/news.jsonl, row 4",
        "chosen",
        "rejected",
        "news · /data/news.jsonl, row 5",
        "undesirable",
    ]
    assert [len(sequence) for sequence in found.sequences] == [len(doc.ids) for doc in (*pair, labelled)]


def test_of_a_long_one_the_middle_is_left_out_and_counted(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "ENDS", 4)
    doc = Doc(list(range(5, 35)), [0.0] * 10 + [1.0] * 20)
    found = read(store_of(tmp_path, [[doc]]), tiny_tokenizer)
    assert [[title for _, title in weights_shown(s)] for s in found.sequences] == [
        [f"id {n}, weight 0" for n in range(5, 9)],
        [f"id {n}, weight 1" for n in range(31, 35)],
    ]
    assert found.rows("examples")[-2] == "… 22 more tokens, 16 of them trained on …"


def many(folder: Path, groups: int, rare_at: int, place: int = 1) -> Store:
    """A store of two documents a pack, and of one document of another source."""
    size = groups * ROW_GROUP
    packs = [[Doc([5, 6, 7], [0.0, 1.0, 1.0], row=2 * n + k) for k in range(2)] for n in range(size)]
    packs[rare_at][place] = Doc([5, 6, 7], [0.0, 1.0, 1.0], source=1, row=77)
    return store_of(folder, packs, ["news", "rare"])


@pytest.mark.parametrize(("rare_at", "place"), [(0, 0), (70, 1), (71, 0), (159, 1)])
def test_examples_are_from_all_over_the_store_and_of_each_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rare_at: int, place: int
) -> None:
    """Though only one group of five is read, and wherever the only row of a source is."""
    monkeypatch.setattr(sample, "MOST_TOKENS", ROW_GROUP * SEQ_LEN)
    store = many(tmp_path, 5, rare_at, place)
    found = sample.sample(store, store.reader("train"), 12)
    assert found.num_packs == ROW_GROUP
    assert sorted(unit.source for unit in found.examples) == ["news"] * 11 + ["rare"]
    (rare,) = (unit for unit in found.examples if unit.source == "rare")
    assert (rare.place.row_group * ROW_GROUP + rare.place.row, rare.first) == (rare_at, place)
    rows = [unit.place.row for unit in found.examples if unit.source == "news"]
    assert max(b - a for a, b in pairwise(rows)) <= 4
    assert rows[0] <= 2
    assert rows[-1] >= ROW_GROUP - 3


def test_the_page_says_that_it_has_read_a_part(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = many(tmp_path, 3, 5)
    assert "Read from all packs of the train split." in read(store, tiny_tokenizer).sections["charts"]
    monkeypatch.setattr(sample, "MOST_TOKENS", 2 * ROW_GROUP * SEQ_LEN)
    assert "Read from 64 of 96 packs, spread evenly" in read(store, tiny_tokenizer).sections["charts"]


def test_more_sources_than_examples_have_one_each(tmp_path: Path, tiny_tokenizer: Any) -> None:
    names = [f"source{n}" for n in range(15)]
    docs = [Doc([5, 6], [0.0, 1.0], source=n % 15, row=n) for n in range(30)]
    found = read(store_of(tmp_path, [docs], names), tiny_tokenizer)
    assert sorted(re.findall(r"(source\d+) ·", found.text)) == sorted(names)
    assert len(found.sequences) == 15


@given(size=st.integers(0, 300), number=st.integers(1, 40))
def test_spread_is_even(size: int, number: int) -> None:
    found = spread(range(size), number)
    assert len(found) == min(size, number)
    gaps = [b - a for a, b in pairwise([-1, *found, size])]
    assert not gaps[1:-1] or max(gaps[1:-1]) - min(gaps[1:-1]) <= 1
    assert all(gaps)
    assert abs(gaps[0] - gaps[-1]) <= 1


# --------------------------------------------------------------------------------------------------- figures


def test_all_counts_are_there(tmp_path: Path, tiny_tokenizer: Any) -> None:
    docs = [Doc(list(range(5, 38)), [0.0] * 17 + [1.0] * 16), Doc([5] * 17, [1.0] * 17, source=1)]
    changes = {
        "num_rejected": 4,
        "rejected_reasons": {"no answer": 3, "<b>bad</b>": 1},
        "reasoning": {KEPT: 1111},
    }
    found = read(
        store_of(tmp_path, [docs], ["law", "news"], **changes), tiny_tokenizer, "raytune-ds data 'a b'", "{1}"
    )
    assert found.rows("counts")[2:] == [
        "splitdocumentspackstokenssupervisedpacks full",
        "train214866.7%75.0%",
        "eval000--",
        "rows read 1,234",
        "bad rows skipped 4",
        f"truncated to {SEQ_LEN} tokens 21 (1.7%)",
        "dropped as too long 34 (2.8%)",
        f"Why rows were skipped; each of them is in {tmp_path}/rejected.jsonl.",
        "3no answer",
        "1<b>bad</b>",
    ]
    columns, shares = "sourcesplitdocumentstokenssupervised tokens", ["66.7%", "50.0%", "33.3%", "50.0%"]
    assert found.rows("mixture")[1:] == [columns, "lawtrain1", *shares[:2], "newstrain1", *shares[2:]]
    assert found.rows("reasoning")[1:] == ["1,111with reasoning"]
    assert found.rows("again")[-1] == "{1}"
    assert "raytune-ds data 'a b'" in found.rows("again")
    assert found.rows("") == [
        "Prepared data 0123abcd",
        "Prepared data",
        f"2 documents in 1 pack of {SEQ_LEN} tokens: 48 tokens, 66.7% of them trained on",
        "No findings",
        f"store{tmp_path}",
        "fingerprint0123abcd",
        "tokenizerorg/model",
        f"seq_len{SEQ_LEN} tokens",
        "sourceslaw, news",
        "files",
        "/data/law.jsonl (alpaca)",
        "/data/news.jsonl (alpaca)",
    ]


def test_the_histograms(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Nothing and everything stand apart; bins with nothing in them between others are shown."""
    shares = [0, 8, 64, 32, 60]
    packs = [[Doc([5] * 65, [0.0] * (65 - n) + [1.0] * n)] for n in shares]
    packs += [[Doc([5] * 33, [1.0] * 33)]]  # the first token is never a target
    found = read(store_of(tmp_path, packs), tiny_tokenizer).rows("charts")
    start, end = found.index("Supervision"), found.index("Packing")
    assert found[3:start] == ["17 to 321,200", "33 to 647"]
    assert found[start + 2 : end] == [
        "none1",
        "0 to 10%0",
        "10 to 20%1",
        *(f"{n} to {n + 10}%{int(n == 50)}" for n in range(20, 90, 10)),
        "90 to 100%1",
        "all2",
    ]
    assert found[end + 2 :] == [
        "50 to 80%1",
        *(f"{a} to {b}%0" for a, b in pairwise((80, 90, 95, 98, 99, 100))),
        "full5",
    ]


def test_bars_are_as_long_as_their_counts(tmp_path: Path, tiny_tokenizer: Any) -> None:
    changes = {"length_histogram": {"32": 400, "64": 100, "128": 1}}
    found = read(store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]], **changes), tiny_tokenizer)
    bars = [
        str(attributes["style"])
        for _, attributes in found.tags
        if str(attributes.get("class")).split()[0] == "bar"
    ]
    assert bars[2:5] == ["--share: 100.00%", "--share: 25.00%", "--share: 0.25%"]


def test_findings_have_their_rows_and_what_stops_is_red(tmp_path: Path, tiny_tokenizer: Any) -> None:
    findings = (
        Finding("no-end-token", 9, 10, (doc_id(0, 1),)),
        Finding("duplicates", 1, 10, (doc_id(0, 4),), (doc_id(0, 2),)),
    )
    found = read(store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]], findings=findings), tiny_tokenizer)
    assert found.rows("findings")[1:] == [
        "Stops training: 9 of 10 rows (90.0%) have an answer without an end token, so that the model does not learn"
        " to stop",
        "/data/news.jsonl, row 2",
        "Set data.chat_template to a template that ends answers, or give the tokenizer an eos_token.",
        "1 of 10 rows (10.0%) are equal to an earlier one and weigh as much again",
        "/data/news.jsonl, row 5, like /data/news.jsonl, row 3",
        "Leave them out, or set `epochs` of their source if they are meant to.",
    ]
    looks = [attributes["class"] for _, attributes in found.tags if "class" in attributes]
    assert [name for name in looks if str(name).startswith(("headline", "finding"))] == [
        "headline stops",
        "finding stops",
        "finding odd",
    ]
    assert "Findings that stop training: 1, others: 1" in found.text


def test_an_empty_train_split_has_a_page(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Whatever stopped it: the page is where one looks for why."""
    store = store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]])
    empty = Store(store.path, type(store.manifest)(**vars(store.manifest) | {"train": store.manifest.eval}))
    assert read(empty, tiny_tokenizer).sequences == []


# ------------------------------------------------------------------------------------------------------ file


def test_names_and_settings_may_hold_anything(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """As text, in which nothing is hidden."""
    changes = {"files": (EVIL,), "formats": {EVIL: EVIL}, "tokenizer": EVIL, "fingerprint": EVIL}
    found = read(
        store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]], [EVIL], **changes), tiny_tokenizer, EVIL, EVIL
    )
    assert {tag for tag, _ in found.tags} <= KNOWN
    assert found.text.count(visible(EVIL)) == 11
    assert not set(found.text) & {"\u202e", "\x00", "\x1b", "\u200b", "\r"}


def test_the_page_needs_nothing_else(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """No link, no address, no script, and a policy that would refuse them."""
    html = page_of(store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]]), tiny_tokenizer, "", "")
    tags = Page(html).tags
    assert not [
        tag for tag, attrs in tags if {"src", "href", "srcset", "action", "data", "onload"} & attrs.keys()
    ]
    assert "url(" not in html
    assert "@import" not in html
    policies = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert len(html) < 40_000


def test_the_page_is_written_beside_the_packs(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever that is."""
    monkeypatch.setattr("raytune_ds.data.store.open_filesystem", storage.open_filesystem)
    store = store_of(tmp_path / "store", [[Doc([5, 6], [0.0, 1.0])]])
    remote = f"{bucket}/store"
    for path in (tmp_path / "store").iterdir():
        storage.write_bytes(f"{remote}/{path.name}", path.read_bytes())
    write_page(Store(remote, store.manifest), TokenizerSpec(str(tiny_models["qwen2"])), "", "\ud800")
    assert capsys.readouterr().out.strip().endswith(f"token by token: {remote}/data.html")
    written = (tmp_path / "bucket" / "runs" / "store" / "data.html").read_text(encoding="utf-8")
    assert written.startswith("<!DOCTYPE html>")
    assert Page(written).sequences


def test_a_store_that_can_not_be_written_to_is_a_warning(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever prepared it: others may look at it."""
    store = store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]])

    def refused(path: str, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(storage, "write_bytes", refused)
    write_page(store, TokenizerSpec(str(tiny_models["qwen2"])), "", "")
    told = capsys.readouterr()
    assert f"the page can't be written to {tmp_path}/data.html" in told.err
    assert "token by token" not in told.out


def test_the_command_line_writes_it_and_says_how_to_do_it_again(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the quotes that a shell needs, and all defaults."""
    store = store_of(tmp_path, [[Doc([5, 6], [0.0, 1.0])]])
    assigned = SimpleNamespace(store=store, tokenizer=TokenizerSpec(str(tiny_models["qwen2"])))
    monkeypatch.setattr("raytune_ds.check.check", lambda config, to_train: config)
    monkeypatch.setattr("raytune_ds.cluster.connect", lambda debug: None)
    monkeypatch.setattr("raytune_ds.launch.assign", lambda checked: assigned)
    (tmp_path / "my own.yaml").write_text("data: {seq_len: 64}")
    typed = ["--config", str(tmp_path / "my own.yaml"), "data.sources=[a.json, b.json]"]
    assert cli.main(["data", *typed]) == 0
    assert f"token by token: {tmp_path}/data.html" in capsys.readouterr().out
    again = Page((tmp_path / "data.html").read_text(encoding="utf-8")).sections["again"]
    command, config = again.partition("The whole config, with all defaults")[::2]
    assert shlex.split(command.strip().splitlines()[-1]) == ["raytune-ds", "data", *typed]
    told = json.loads(config)["data"]
    assert (told["seq_len"], len(told["sources"])) == (64, 2)
