"""A prepared store as a person wants to see it: what is in it, how long, how full, and what is trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from raytune_ds.console import human_count, out, say, table
from raytune_ds.data.gate import described
from raytune_ds.data.labels import Label, units
from raytune_ds.data.order import Place
from raytune_ds.data.store import Manifest, Split, Store, file_and_row
from raytune_ds.data.template import Encoded, coloured, marked
from raytune_ds.data.thinking import NONE
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer

BAR = 40
TEXT_ENDS = 120
"""Tokens of a raw text that are shown from its beginning, and as many from its end: all between is trained on too."""


def show(store: Store, tokenizer: TokenizerSpec, num_examples: int) -> None:
    """Prints counts, the token-length histogram, packing efficiency and some examples in colour."""
    manifest = store.manifest
    table(
        f"data prepared in {store.path}",
        ["split", "documents", "packs", "tokens", "supervised", "packs full"],
        [split_row(name, store.split(name), manifest.seq_len) for name in ("train", "eval")],
    )
    _mixture(manifest)
    say(", ".join(fates(manifest)))
    if set(manifest.reasoning) - {NONE}:
        say(f"answers: {_counted(manifest.reasoning)}")
    for reason, count in manifest.rejected_reasons.items():
        say(f"  {count:,} x {reason}")
    _histogram(manifest)
    _findings(store)
    _examples(store, tokenizer, num_examples)


def _mixture(manifest: Manifest) -> None:
    if len(manifest.sources) > 1:
        columns = ["source", "split", "documents", "tokens", "supervised tokens"]
        table("mixture of an epoch", columns, mixture(manifest))


def mixture(manifest: Manifest) -> list[tuple[str, str, str, str, str]]:
    """What each source has in an epoch: its name, the split, documents, share of tokens, of supervised tokens."""
    rows = []
    for name, split in (("train", manifest.train), ("eval", manifest.eval)):
        tokens = sum(part.num_tokens for part in split.sources.values())
        supervised = sum(part.num_supervised for part in split.sources.values())
        rows += [
            (
                source,
                name,
                f"{part.num_docs:,}",
                percent(part.num_tokens, tokens),
                percent(part.num_supervised, supervised),
            )
            for source, part in split.sources.items()
        ]
    return rows


def _findings(store: Store) -> None:
    findings = store.manifest.findings
    say("\nfindings" if findings else "\nfindings: none", style="bold")
    for finding in findings:
        first, *rest = described(finding, store)
        say(f"  {'stops training: ' * finding.stops}{first}", style="red" if finding.stops else "yellow")
        say("\n".join(f"  {line}" for line in rest), style="dim")


def _counted(answers: dict[str, int]) -> str:
    return "; ".join(f"{count:,} {fate}" for fate, count in answers.items())


def fates(manifest: Manifest) -> list[str]:
    """What became of the rows, as far as it can have happened to rows of their formats."""
    rows, formats = manifest.num_rows, set(manifest.formats.values())
    told = [f"rows read {rows:,}", f"bad rows skipped {manifest.num_rejected:,}"]
    if formats - {"text"}:
        told.append(f"truncated to {manifest.seq_len} tokens {_share(manifest.num_truncated, rows)}")
        told.append(f"dropped as too long {_share(manifest.num_dropped_long, rows)}")
    if "text" in formats:
        told.append(f"split into documents of {manifest.seq_len} tokens {_share(manifest.num_split, rows)}")
    return told


def split_row(name: str, split: Split, seq_len: int) -> tuple[str, ...]:
    """Its name, documents, packs, tokens, the share trained on, and the share of the packs that is not empty."""
    room = split.num_packs * seq_len
    return (
        name,
        f"{split.num_docs:,}",
        f"{split.num_packs:,}",
        human_count(split.num_tokens),
        percent(split.num_supervised, split.num_tokens),
        percent(split.num_tokens, room),
    )


def percent(part: int, whole: int) -> str:
    """A share, if there is something to have one of."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part, whole)})"


def _histogram(manifest: Manifest) -> None:
    bins = lengths(manifest)
    say(f"\n{lengths_of(manifest)}", style="bold")
    most = max((count for _, count in bins), default=1)
    for label, count in bins:
        say(f"  {label:>18} {count:>9,} {'█' * max(1, round(BAR * count / most))}")


def lengths_of(manifest: Manifest) -> str:
    """What `lengths` are the lengths of."""
    return f"tokens a document{', before it is split' * (manifest.num_split > 0)}"


def lengths(manifest: Manifest) -> list[tuple[str, int]]:
    """The histogram of lengths: a bin in words, and its rows."""
    bins = {int(upper): count for upper, count in manifest.length_histogram.items()}
    return [(f"{upper // 2 + 1:>7,} to {upper:>7,}", bins[upper]) for upper in sorted(bins)]


def _examples(store: Store, tokenizer: TokenizerSpec, number: int) -> None:
    loaded = load_tokenizer(tokenizer)
    how = "green" if out.is_terminal else "between « and »"
    say(f"\nexamples: what is trained on is {how}", style="bold")
    for doc, unit in _units(store, number):
        file, row = file_and_row(doc)
        path = store.manifest.files[file]
        say(f"\n{path}, row {row + 1}", style="underline")
        for encoded in unit:
            if encoded.label != Label.PLAIN:
                say(f"{encoded.label.name.lower()}:", style="bold")
            _show(encoded, loaded, shortened=store.manifest.formats[path] == "text")


def _show(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, shortened: bool) -> None:
    for part in parts(encoded, TEXT_ENDS) if shortened else [encoded]:
        if isinstance(part, int):
            say(f"... {part:,} more tokens, all trained on ...", style="dim")
        else:
            out.print(coloured(part, tokenizer) if out.is_terminal else marked(part, tokenizer), markup=False)


def parts(text: Encoded, ends: int) -> list[Encoded | int]:
    """A long text without its middle: the `ends` tokens of its beginning, number of tokens left out, its end."""
    left_out = len(text.ids) - 2 * ends
    if left_out <= 0:
        return [text]
    return [text.part(0, ends), left_out, text.part(len(text.ids) - ends, len(text.ids))]


def _units(store: Store, number: int) -> Iterator[tuple[int, list[Encoded]]]:
    """Some documents, or pairs of them, as they will be trained on, read back from the first packs."""
    reader = store.reader("train")
    for position in range(min(number, store.manifest.train.num_packs)):
        pack = reader.pack(Place(*divmod(position, store.manifest.row_group)))
        size = units(pack["docs"], pack["labels"])[1]
        yield int(pack["docs"][0]), [document(pack, index) for index in range(size)]


def document(pack: dict[str, np.ndarray], index: int) -> Encoded:
    """A document of a pack as it was before its targets were shifted."""
    end = int(pack["lengths"][: index + 1].sum())
    start = end - int(pack["lengths"][index])
    ids = np.append(pack["ids"][start:end], pack["targets"][end - 1])
    weights = np.append(np.zeros(1), pack["weights"][start:end])
    return Encoded(ids.tolist(), weights.tolist(), Label(pack["labels"][index]))
