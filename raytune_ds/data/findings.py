"""What is wrong, or odd, with prepared data: how often, in which rows, and whether training on it makes sense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 0.5
"""Share of the rows from which a grave finding makes training pointless."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        says: what is so of the rows, behind their number.
        advice: what to do about it.
        grave: whether to train on data most of whose rows have it makes no sense.
    """

    says: str
    advice: str
    grave: bool = False


KINDS: Mapping[str, Kind] = {
    "all-supervised": Kind(
        "are trained on whole, the question too",
        "The chat template shows no prompt before the answer: look at the examples, and mend the template.",
        grave=True,
    ),
    "double-bos": Kind(
        "begin with the BOS token twice",
        "The chat template writes it, and so does something else: take it out of the template or the rows.",
        grave=True,
    ),
    "no-end-token": Kind(
        "have an answer without an end token, so that the model does not learn to stop",
        "Set data.chat_template to a template that ends answers, or give the tokenizer an eos_token.",
        grave=True,
    ),
    "answer-changed": Kind(
        "have an answer that is another one when its tokens are decoded",
        "Chat template or tokenizer change the text: compare the rows named with the examples.",
        grave=True,
    ),
    "reasoning-lost": Kind(
        "lose their reasoning on the way",
        "The chat template drops it, or closes it in the prompt. If it is meant to go, set data.thinking=drop; if not,"
        " set data.thinking=keep, or data.chat_template to one that opens it.",
        grave=True,
    ),
    "reasoning-unbalanced": Kind(
        "open <think> and do not close it, or the other way round",
        "Whatever reads the answers will take one for the other: mend the rows.",
    ),
    "cut-off": Kind(
        "are longer than data.seq_len and cut off, so that the model does not see how they end",
        "Raise data.seq_len, or leave them out with data.on_long_row=drop.",
    ),
    "too-long": Kind("are longer than data.seq_len and left out", "Raise data.seq_len."),
    "duplicates": Kind(
        "are equal to an earlier one and weigh as much again",
        "Leave them out, or set `epochs` of their source if they are meant to.",
    ),
    "near-duplicates": Kind(
        "are nearly equal to an earlier one (80 % and more of their text)",
        "Look whether they are meant to be.",
    ),
    "leaked": Kind(
        "are held out and trained on as well, so that the held-out loss looks better than it is",
        "Take the duplicates out, or name data.eval.sources of their own.",
    ),
    "nearly-leaked": Kind(
        "are held out and nearly equal to one that is trained on",
        "The held-out loss looks better than it is: take near duplicates out, or name data.eval.sources.",
    ),
    "control-text": Kind(
        "hold text that looks like control tokens; it was kept as text",
        "Nothing has to be done. If it is meant to be one: a row should not write its own template.",
    ),
    "control-token": Kind(
        "are raw text with control tokens in it, which they become",
        "Take them out if they are not meant to.",
    ),
    "damaged-text": Kind(
        "hold characters of a wrong encoding (\ufffd, or UTF-8 read as Latin-1)",
        "Read the originals as what they are; ftfy mends what has no original.",
    ),
    "other-writing": Kind(
        "are written in another script than most", "Look whether they are meant to be there."
    ),
    "answer-in-other-writing": Kind(
        "are answered in another script than they ask in", "Look whether they are meant to be."
    ),
    "far-out": Kind(
        "are far longer than the others (16 times the median and more)",
        "Look whether something went in by mistake.",
    ),
}
"""All kinds, in the order in which they are shown."""


@dataclass(frozen=True)
class Finding:
    """What was found of one kind.

    Attributes:
        kind: a key of KINDS.
        count: rows that have it.
        of: rows that could have it.
        rows: the first few, by their ids (store.doc_id).
        others: for each of them the row that it is like; empty where that means nothing.
        detail: figures of this kind.
    """

    kind: str
    count: int
    of: int
    rows: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    detail: str = ""

    @staticmethod
    def of_json(values: dict[str, Any]) -> Finding:
        """The way back from JSON."""
        return Finding(**{**values, "rows": tuple(values["rows"]), "others": tuple(values["others"])})

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.count / self.of if self.of else 0.0

    @property
    def stops(self) -> bool:
        """Whether training makes no sense."""
        return KINDS[self.kind].grave and self.share >= MOST

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.count:,} of {self.of:,} rows ({percent(self.share)}) {KINDS[self.kind].says}{detail}"


def percent(share: float) -> str:
    """A share in words that never round something to nothing."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%"


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """What stops training first, then by kind."""
    kinds = list(KINDS)
    return sorted(findings, key=lambda found: (not found.stops, kinds.index(found.kind)))


def of_writing(counts: Mapping[str, int], rows: Mapping[str, list[int]]) -> Iterator[Finding]:
    """Whether some rows are written in another script than most.

    Args:
        counts: rows by script; '' where there are no letters.
        rows: the first few of each.
    """
    known = {script: count for script, count in counts.items() if script}
    if len(known) < 2:
        return
    main = max(known, key=lambda script: known[script])
    total = sum(known.values())
    others = sorted((script for script in known if script != main), key=lambda script: -known[script])
    shares = ", ".join(f"{script} {percent(known[script] / total)}" for script in [main, *others])
    first = sorted(row for script in others for row in rows[script])[:3]
    yield Finding("other-writing", total - known[main], total, tuple(first), detail=shares)


def of_lengths(histogram: Mapping[int, int], longest: Sequence[Sequence[int]]) -> Iterator[Finding]:
    """Whether some rows are far longer than the others.

    Args:
        histogram: rows by the upper end of their bin of tokens, powers of two.
        longest: tokens and id of the longest rows.
    """
    total, seen = sum(histogram.values()), 0
    if not total:
        return
    for upper in sorted(histogram):
        seen += histogram[upper]
        if 2 * seen >= total:
            break
    limit = 16 * upper
    count = sum(number for bound, number in histogram.items() if bound > limit)
    if count:
        rows = tuple(doc for tokens, doc in longest if tokens > limit)
        yield Finding("far-out", count, total, rows, detail=f"the longest has {longest[0][0]:,} tokens")
