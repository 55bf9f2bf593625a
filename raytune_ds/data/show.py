"""A prepared store as a person wants to see it: what is in it, how long, how full, and what is trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raytune_ds.console import human_count, out, say, table
from raytune_ds.data.order import Place
from raytune_ds.data.store import Split, Store, file_and_row
from raytune_ds.data.template import Encoded, coloured, marked
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer

BAR = 40


def show(store: Store, tokenizer: TokenizerSpec, num_examples: int) -> None:
    """Prints counts, the token-length histogram, packing efficiency and some examples in colour."""
    manifest = store.manifest
    table(
        f"data prepared in {store.path}",
        ["split", "documents", "packs", "tokens", "supervised", "packs full"],
        [_split_row(name, store.split(name), manifest.seq_len) for name in ("train", "eval")],
    )
    say(
        f"rows read {manifest.num_rows:,}, bad rows skipped {manifest.num_rejected:,}, "
        f"truncated to {manifest.seq_len} tokens {_share(manifest.num_truncated, manifest.num_rows)}, "
        f"dropped as too long {_share(manifest.num_dropped_long, manifest.num_rows)}"
    )
    for reason, count in manifest.rejected_reasons.items():
        say(f"  {count:,} x {reason}")
    _histogram({int(k): v for k, v in manifest.length_histogram.items()})
    _examples(store, tokenizer, num_examples)


def _split_row(name: str, split: Split, seq_len: int) -> tuple[object, ...]:
    room = split.num_packs * seq_len
    return (
        name,
        f"{split.num_docs:,}",
        f"{split.num_packs:,}",
        human_count(split.num_tokens),
        _percent(split.num_supervised, split.num_tokens),
        _percent(split.num_tokens, room),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part, whole)})"


def _histogram(bins: dict[int, int]) -> None:
    say("\ntokens a document", style="bold")
    most = max(bins.values(), default=1)
    for upper in sorted(bins):
        bar = "█" * max(1, round(BAR * bins[upper] / most))
        say(f"  {upper // 2 + 1:>7,} to {upper:>7,} {bins[upper]:>9,} {bar}")


def _examples(store: Store, tokenizer: TokenizerSpec, number: int) -> None:
    loaded = load_tokenizer(tokenizer)
    how = "green" if out.is_terminal else "between « and »"
    say(f"\nexamples: what is trained on is {how}", style="bold")
    for doc, encoded in _documents(store, number):
        file, row = file_and_row(doc)
        say(f"\n{store.manifest.files[file]}, row {row + 1}", style="underline")
        out.print(coloured(encoded, loaded) if out.is_terminal else marked(encoded, loaded), markup=False)


def _documents(store: Store, number: int) -> Iterator[tuple[int, Encoded]]:
    """Some documents as they will be trained on, read back from the first packs."""
    reader = store.reader("train")
    for position in range(min(number, store.manifest.train.num_packs)):
        pack = reader.pack(Place(*divmod(position, store.manifest.row_group)))
        end = int(pack["lengths"][0])
        ids = np.append(pack["ids"][:end], pack["targets"][end - 1])
        weights = np.append(np.zeros(1), pack["weights"][:end])
        yield int(pack["docs"][0]), Encoded(ids.tolist(), weights.tolist())
