"""The page of a prepared store: all that is known of it, and examples token by token, as one HTML file.

It needs nothing else and runs no script. Rows may hold whatever people write into them: all of it is text here.
"""

from __future__ import annotations

from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from raytune_ds import storage
from raytune_ds.console import human_count, say, warn
from raytune_ds.data.findings import Finding
from raytune_ds.data.gate import described
from raytune_ds.data.labels import Label
from raytune_ds.data.sample import Bin, Sample, Unit, sample
from raytune_ds.data.show import document, fates, lengths, lengths_of, mixture, parts, percent, split_row
from raytune_ds.data.spelled import Token, spelled, visible
from raytune_ds.data.store import SPLITS, Manifest, PackReader, Store, file_and_row
from raytune_ds.data.template import Encoded
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer

FILE = "data.html"
EXAMPLES = 12
"""If there are no more sources: each has one at least."""
ENDS = 1500
"""Tokens of an example that are shown from its beginning, and as many from its end, if it is longer than both."""


@dataclass(frozen=True)
class Chart:
    """A histogram with its words."""

    title: str
    caption: str
    bins: tuple[Bin, ...]

    @property
    def most(self) -> int:
        """What the longest bar stands for."""
        return max((bar.number for bar in self.bins), default=0)


@dataclass(frozen=True)
class Gap:
    """What is left out of the middle of a long sequence."""

    tokens: int
    supervised: int


@dataclass(frozen=True)
class Shown:
    """One document of an example, token by token."""

    label: str
    tokens: int
    supervised: str
    parts: list[list[Token] | Gap]


@dataclass(frozen=True)
class Example:
    """What one row became."""

    source: str
    path: str
    row: int
    sequences: list[Shown]


@dataclass(frozen=True)
class Told:
    """A finding in words."""

    stops: bool
    says: str
    rows: list[str]
    advice: str


def write_page(store: Store, tokenizer: TokenizerSpec, command: str, config: str) -> None:
    """Writes the page beside the store's packs and says where; a folder that can't be written to is no error.

    Args:
        store: finished.
        tokenizer: that it was made with.
        command: that shows it again.
        config: resolved, as JSON.
    """
    path, page = f"{store.path}/{FILE}", page_of(store, load_tokenizer(tokenizer), command, config)
    try:
        storage.write_bytes(path, page.encode())
    except OSError as error:
        warn(f"data: the page can't be written to {path}: {error}")
    else:
        say(f"\nall of this, and more examples, token by token: {path}")


def page_of(store: Store, tokenizer: PreTrainedTokenizerBase, command: str, config: str) -> str:
    """The page itself; see `write_page`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raytune_ds", "data"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        # Names of files and reasons may hold anything too, such as characters that turn a line around.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    manifest, reader = store.manifest, store.reader("train")
    seen = sample(store, reader, EXAMPLES)
    told = [_told(finding, store) for finding in manifest.findings]
    return environment.get_template("page.html.j2").render(
        store=store,
        manifest=manifest,
        headline=_headline(manifest),
        verdict=_verdict(told),
        findings=told,
        splits=[split_row(name, store.split(name), manifest.seq_len) for name in SPLITS],
        fates=fates(manifest),
        mixture=mixture(manifest),
        charts=_charts(manifest, seen),
        examples=[_example(store, reader, unit, tokenizer) for unit in seen.examples],
        command=command,
        config=config,
    )


def _headline(manifest: Manifest) -> str:
    train = manifest.train
    return (
        f"{_many(train.num_docs, 'document')} in {_many(train.num_packs, 'pack')} of {manifest.seq_len:,} tokens: "
        f"{human_count(train.num_tokens)} tokens, {percent(train.num_supervised, train.num_tokens)} of them trained on"
    )


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _verdict(told: list[Told]) -> tuple[str, str]:
    """Its looks, and whether there is something to mend."""
    stops = sum(finding.stops for finding in told)
    if stops:
        return "stops", f"Findings that stop training: {stops}, others: {len(told) - stops}"
    return (
        ("odd", f"Findings: {len(told)}, none of which stops training") if told else ("sound", "No findings")
    )


def _told(finding: Finding, store: Store) -> Told:
    says, *rows, advice = described(finding, store)
    return Told(finding.stops, says, [row.removeprefix("  ") for row in rows], advice.removeprefix("  "))


def _charts(manifest: Manifest, seen: Sample) -> list[Chart]:
    num_packs = manifest.train.num_packs
    packs = f"{seen.num_packs:,} of {num_packs:,} packs, spread evenly"
    of = f"Read from {'all packs' if seen.num_packs == num_packs else packs} of the train split."
    return [
        Chart(
            "Length",
            f"Rows by {lengths_of(manifest)}, with those that are held out or left out.",
            tuple(Bin(label.strip(), count) for label, count in lengths(manifest)),
        ),
        Chart(
            "Supervision",
            f"Documents by the share of their tokens that is trained on. {of}",
            seen.supervision,
        ),
        Chart(
            "Packing",
            f"Packs by the share of their {manifest.seq_len:,} tokens that is not empty. {of}",
            seen.fill,
        ),
    ]


def _example(store: Store, reader: PackReader, unit: Unit, tokenizer: PreTrainedTokenizerBase) -> Example:
    pack = reader.pack(unit.place)
    documents = [document(pack, index) for index in range(unit.first, unit.first + unit.size)]
    file, row = file_and_row(int(pack["docs"][unit.first]))
    return Example(
        unit.source, store.manifest.files[file], row + 1, [_sequence(each, tokenizer) for each in documents]
    )


def _sequence(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Shown:
    label = "" if encoded.label == Label.PLAIN else encoded.label.name.lower()
    trained = percent(encoded.num_supervised, len(encoded.ids) - 1)
    ends = [part for part in parts(encoded, ENDS) if isinstance(part, Encoded)]
    shown: list[list[Token] | Gap] = [spelled(part, tokenizer) for part in ends]
    if len(ends) > 1:
        middle = encoded.part(ENDS, len(encoded.ids) - ENDS)
        shown.insert(1, Gap(len(middle.ids), sum(weight != 0 for weight in middle.weights)))
    return Shown(label, len(encoded.ids), trained, shown)
