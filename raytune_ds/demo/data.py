"""The demo's rows: glossary questions whose answer is the bare meaning of a term.

The demo trains a tiny model in two phases. The general phase takes every general fact in every phrasing, so
the model learns how questions are worded. The domain phase takes the prescription facts in the `train`
phrasings only; the `held_out` phrasings of those same facts are what the demo measures afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Fact(NamedTuple):
    """A term and what it means."""

    term: str
    meaning: str


class Phrasings(NamedTuple):
    """The question wordings, each containing `{term}`, and the one answer template."""

    answer: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def general_facts() -> list[Fact]:
    """The facts the base model learns, all groups of them, in the order of the file."""
    groups = _load("facts.yaml")["general"]
    return [Fact(**entry) for group in groups.values() for entry in group]


def prescription_facts() -> list[Fact]:
    """The facts of the domain the base model has never seen."""
    return [Fact(**entry) for entry in _load("facts.yaml")["prescription"]]


def phrasings() -> Phrasings:
    """The question wordings, trained and held out, and the answer template."""
    raw = _load("phrasings.yaml")
    return Phrasings(raw["answer"], tuple(raw["train"]), tuple(raw["held_out"]))


def general_rows() -> Iterator[dict[str, str]]:
    """Every general fact in every phrasing, the held-out ones included."""
    wording = phrasings()
    return _rows(general_facts(), wording.train + wording.held_out, wording.answer)


def recall_rows() -> Iterator[dict[str, str]]:
    """Every general fact in one phrasing that the domain phase never sees: what it should not make forgotten."""
    wording = phrasings()
    for number, fact in enumerate(general_facts()):
        yield from _rows([fact], [wording.held_out[number % len(wording.held_out)]], wording.answer)


def domain_rows() -> Iterator[dict[str, str]]:
    """Every prescription fact in the phrasings that are trained on."""
    wording = phrasings()
    return _rows(prescription_facts(), wording.train, wording.answer)


def held_out_rows() -> Iterator[dict[str, str]]:
    """Every prescription fact in the phrasings that the domain phase never sees."""
    wording = phrasings()
    return _rows(prescription_facts(), wording.held_out, wording.answer)


def write_rows(rows: Iterable[dict[str, str]], path: str | Path) -> int:
    """Write the rows as JSON lines, making the folder where it is missing, and return their number."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _rows(facts: Iterable[Fact], questions: Iterable[str], answer: str) -> Iterator[dict[str, str]]:
    """Yield one alpaca-style row for each fact and question."""
    wordings = tuple(questions)
    for fact in facts:
        for question in wordings:
            yield {
                "instruction": question.format(term=fact.term),
                "input": "",
                "output": answer.format(term=fact.term, meaning=fact.meaning),
            }


def _load(name: str) -> dict[str, Any]:
    """Parse one of the YAML files that lie next to this module."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
