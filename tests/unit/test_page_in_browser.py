"""The page of a prepared store as a real browser makes it; skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from raytune_ds.data.findings import Finding
from raytune_ds.data.labels import Label
from raytune_ds.data.page import page_of
from raytune_ds.data.spelled import visible
from raytune_ds.data.store import doc_id
from tests.browser import NAMES, PHONE, Browser, find
from tests.pages import EVIL, Doc, doc_of, store_of

ANSWER = f"1 < 2 {EVIL}" + " word" * 40
CODE = "def f():\n    return 1\n"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} on the path; RAYTUNE_BROWSER may name one")
    return Browser(program, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def docs(tiny_tokenizer: Any) -> list[Doc]:
    """One with what a browser must not take for anything else, code, and a pair."""
    pair = [
        doc_of(tiny_tokenizer, "question", answer, source=1, row=3, label=label)
        for answer, label in (("good", Label.CHOSEN), ("bad", Label.REJECTED))
    ]
    return [doc_of(tiny_tokenizer, EVIL, ANSWER), doc_of(tiny_tokenizer, "code?", CODE, row=1), *pair]


@pytest.fixture(scope="module")
def page(docs: list[Doc], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    changes = {
        "num_rejected": 1,
        "rejected_reasons": {EVIL: 1},
        "findings": (
            Finding("no-end-token", 9, 10, (doc_id(0, 1),)),
            Finding("duplicates", 1, 10, (doc_id(0, 4),), (doc_id(0, 2),)),
        ),
    }
    store = store_of(folder, [docs], ["a-source-with-quite-a-long-name-" * 3, "pairs"], **changes)
    path = folder / "data.html"
    path.write_text(page_of(store, tiny_tokenizer, EVIL, EVIL), encoding="utf-8")
    return path


def asked(browser: Browser, page: Path, question: str, width: int = 1200) -> Any:
    """What a browser answers to a question about the page."""
    return json.loads(browser.asked(page, f"JSON.stringify({question})", width))


def test_the_browser_reads_each_token_as_it_is(
    browser: Browser, page: Path, docs: list[Doc], tiny_tokenizer: Any
) -> None:
    """All of them, with their weights, and of their texts the whole."""
    boxes = asked(
        browser,
        page,
        '[...page.querySelectorAll(".tokens")].map(box =>'
        " [box.textContent, [...box.childNodes].map(token => [token.nodeName, token.title])])",
    )
    assert [text for text, _ in boxes] == [visible(tiny_tokenizer.decode(doc.ids)) for doc in docs]
    assert [tokens for _, tokens in boxes] == [
        [
            ["MARK" if weight else "SPAN", f"id {token}, weight {weight:g}"]
            for token, weight in zip(doc.ids, doc.weights, strict=True)
        ]
        for doc in docs
    ]


def test_nothing_of_the_data_is_run_or_fetched(browser: Browser, page: Path) -> None:
    """Nor is there an element that could be, had the page no policy."""
    question = '[page.title, page.querySelectorAll("script, img, b[style]").length]'
    assert asked(browser, page, question) == ["Prepared data 0123abcd", 0]
    bare = page.with_name("bare.html")
    html = page.read_text(encoding="utf-8")
    bare.write_text(html.replace('http-equiv="Content-Security-Policy"', ""), encoding="utf-8")
    assert bare.read_text(encoding="utf-8") != html
    assert asked(browser, bare, question) == ["Prepared data 0123abcd", 0]


@pytest.mark.parametrize("width", [PHONE, 1200])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    assert asked(browser, page, "page.documentElement.scrollWidth", width) == width


def test_what_is_trained_on_is_told_by_colour_and_by_line(browser: Browser, page: Path) -> None:
    """And each token from the next."""
    looks = (
        '["mark:nth-child(even)", "mark:nth-child(odd)", "span:nth-child(even)", "span:nth-child(odd)"].map(which => {'
        ' const style = view.getComputedStyle(page.querySelector(".tokens > " + which + ":not(.control)"));'
        " return [style.color, style.backgroundColor, style.boxShadow] })"
    )
    trained, trained_next, read, read_next = asked(browser, page, looks)
    assert len({look[1] for look in (trained, trained_next, read, read_next)}) == 4
    assert trained[0] != read[0]
    assert trained[2] == trained_next[2] != read[2] == read_next[2]
    assert "none" not in (trained[2], read[2])


def test_white_space_keeps_its_place(browser: Browser, page: Path) -> None:
    """Code is as tall as its lines, and a space and a line break have a sign."""
    (height, line), sign, space = asked(
        browser,
        page,
        "(box => [[box.clientHeight, parseFloat(view.getComputedStyle(box).lineHeight)],"
        ' view.getComputedStyle(box.querySelector(".newline"), "::before").content,'
        ' view.getComputedStyle(box.querySelector(".space")).backgroundImage])'
        '(page.querySelectorAll(".tokens")[1])',
    )
    assert height > 2 * line
    assert sign == '"↵"'
    assert space.startswith("radial-gradient")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_follows_the_scheme_of_the_reader(
    browser: Browser, page: Path, tmp_path: Path, dark: bool
) -> None:
    """Something is drawn, on paper that is light or dark."""
    browser.screenshot(page, tmp_path / "page.png", 1200, dark)
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert (pixels[0, 0].mean() < 0.2) == dark
    assert np.unique(pixels.reshape(-1, 3), axis=0).shape[0] > 50
