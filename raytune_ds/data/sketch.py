"""What a text has in common with others, and what it is written in, from its characters alone.

Near duplicates are found as Broder (1997) has it: of two texts' sets of shingles (here of 8 characters, which needs no
words and so takes any language), the share in common is the share of equal minima of random hashes. Texts whose minima
agree in a whole band of them are compared: with 8 bands of 8, of pairs that have 90 % of their shingles in
common 99 % are compared, of those with 80 % three quarters, of those with 50 % one in thirty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

SHINGLE = 8  # a power of two
BANDS = 8
MINIMA = 64
ALIKE = 0.8
"""Share of shingles in common from which two texts are near duplicates."""
_MOST_CHARACTERS = 1 << 20
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)

# First code points of ranges, and what is written in them; the ones before letters are nobody's.
_RANGES: tuple[tuple[int, str], ...] = (
    (0x0, ""),
    (0x41, "Latin"),
    (0x5B, ""),
    (0x61, "Latin"),
    (0x7B, ""),
    (0xC0, "Latin"),
    (0x2B0, ""),
    (0x370, "Greek"),
    (0x400, "Cyrillic"),
    (0x530, "Armenian"),
    (0x590, "Hebrew"),
    (0x600, "Arabic"),
    (0x780, ""),
    (0x900, "Devanagari"),
    (0x980, "other Indic"),
    (0xE00, "Thai"),
    (0xE80, ""),
    (0x10A0, "Georgian"),
    (0x1100, "Korean"),
    (0x1200, ""),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, ""),
    (0x3040, "Japanese"),
    (0x3100, ""),
    (0x3400, "Chinese"),
    (0x4DC0, ""),
    (0x4E00, "Chinese"),
    (0xA000, ""),
    (0xAC00, "Korean"),
    (0xD7B0, ""),
    (0xF900, "Chinese"),
    (0xFB00, ""),
    (0x20000, "Chinese"),
    (0x32000, ""),
)
_STARTS = np.array([start for start, _ in _RANGES], np.uint32)
_SCRIPTS = tuple(dict.fromkeys(script for _, script in _RANGES))
_NO_LETTERS = {code: None for code in range(0x80) if not chr(code).isalpha()}
_SCRIPT_OF_RANGE = np.array([_SCRIPTS.index(script) for _, script in _RANGES])


def code_points(text: str) -> np.ndarray:
    """The characters of a text as uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def scripts_in(text: str) -> Counter[str]:
    """How many letters are of which script."""
    if text.isascii():  # the quick way for most texts
        letters = len(text.translate(_NO_LETTERS))
        return Counter({"Latin": letters} if letters else {})
    ranges = np.searchsorted(_STARTS, code_points(text), side="right") - 1
    counts = np.bincount(_SCRIPT_OF_RANGE[ranges], minlength=len(_SCRIPTS)).tolist()
    return Counter(
        {script: count for script, count in zip(_SCRIPTS, counts, strict=True) if script and count}
    )


def main_script(counts: Counter[str]) -> str:
    """The script that most of some letters are of; empty where there are none.

    Writing, not language: French and English are both Latin. A text with kana counts as Japanese.
    """
    if counts["Japanese"] > counts.total() // 10:
        return "Japanese"
    return max(counts, key=lambda script: (counts[script], script), default="")


@dataclass(frozen=True)
class Marks:
    """By which texts are found to be like others.

    Attributes:
        exact: equal for equal texts: uint64 [n].
        near: equal in one of its bands at least for texts that are alike: uint64 [n, BANDS].
        sketches: by which `likeness` tells how much: uint8 [n, MINIMA].
    """

    exact: np.ndarray
    near: np.ndarray
    sketches: np.ndarray

    @staticmethod
    def of(wholes: Sequence[str], texts: Sequence[str]) -> Marks:
        """Those of rows, by all that is in each, and by the text in which it may be like others."""
        exact = np.array([xxhash.xxh3_64_intdigest(whole.encode()) for whole in wholes], np.uint64)
        groups = [_minima(group) for group in _grouped(texts)]
        minima = np.concatenate(groups) if groups else _minima([])
        bands = minima.reshape(len(texts), BANDS, MINIMA // BANDS).astype(np.uint64)
        near = np.zeros((len(texts), BANDS), np.uint64) + np.arange(BANDS, dtype=np.uint64)
        for place in range(bands.shape[2]):
            near = _mixed(near * _MULTIPLIER + bands[:, :, place])
        return Marks(exact, near, (minima & np.uint32(0xFF)).astype(np.uint8))


def likeness(sketches: np.ndarray, others: np.ndarray) -> np.ndarray:
    """About the share of shingles that texts have in common; bytes of minima are equal by chance in 1 of 256.

    Args:
        sketches: uint8, shape [n, MINIMA].
        others: of the texts that they are held against, of the same shape.
    """
    return np.asarray((sketches == others).mean(axis=1))


def _grouped(texts: Sequence[str]) -> Iterator[list[str]]:
    """Groups of texts of bounded length; of a very long text its beginning stands for it."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > _MOST_CHARACTERS:
            yield group
            group, size = [], 0
        group.append(text[:_MOST_CHARACTERS])
        size += len(text)
    if group:
        yield group


def _minima(texts: Sequence[str]) -> np.ndarray:
    """The least of the shingle hashes of each text that fall into each of MINIMA bins: uint32 [n, MINIMA].

    That is one permutation's minima in place of as many permutations' (Li, Owen and Zhang 2012), at a tenth of the cost
    of a MinHash of datasketch. A bin that nothing falls into takes its neighbour's minimum (Shrivastava and Li 2014).
    """
    hashes, text_of = _shingles(texts)
    flat = np.full(len(texts) * MINIMA, _EMPTY, np.uint32)
    bins = text_of * MINIMA + (hashes % np.uint64(MINIMA)).astype(np.int64)
    np.minimum.at(flat, bins, (hashes >> np.uint64(32)).astype(np.uint32))
    minima = flat.reshape(len(texts), MINIMA)
    places = np.where(minima == _EMPTY, 2 * MINIMA, np.arange(MINIMA))
    around = np.concatenate([places, places + MINIMA], axis=1)
    nearest = np.minimum.accumulate(around[:, ::-1], axis=1)[:, ::-1][:, :MINIMA]
    return np.take_along_axis(minima, nearest % MINIMA, axis=1)


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each run of SHINGLE characters, case and white space apart, and the text it is of: uint64, int64."""
    plain = [" ".join(text.lower().split()).ljust(SHINGLE, "\0") for text in texts]
    lengths = np.array([len(text) for text in plain], np.int64)
    hashes = code_points("".join(plain)).astype(np.uint64)
    width, power = 1, int(_MULTIPLIER)
    while width < SHINGLE:  # polynomials of runs, each from two of half as many characters
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        width, power = 2 * width, power * power % (1 << 64)
    within = np.ones(lengths.sum(), bool)
    within[np.cumsum(lengths)[:, None] - np.arange(1, SHINGLE)] = False  # those go on into the next text
    text_of = np.repeat(np.arange(len(plain)), lengths - SHINGLE + 1)
    return _mixed(hashes[within[: len(hashes)]]), text_of


def _mixed(hashes: np.ndarray) -> np.ndarray:
    hashes = (hashes ^ (hashes >> np.uint64(29))) * _MIXER
    return hashes ^ (hashes >> np.uint64(32))
