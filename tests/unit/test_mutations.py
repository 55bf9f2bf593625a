"""Ten thousand rows with something wrong with them: nothing crashes, and each is used or told why it is not."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytune_ds.config import DataConfig
from raytune_ds.data.chunks import bucket_documents
from raytune_ds.data.formats import FORMATS
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.job import Job
from raytune_ds.data.scatter import encode_chunks, read_chunks
from raytune_ds.data.store import file_and_row
from raytune_ds.data.tokenizer import TokenizerSpec

LINES = 1500  # of each format
ITEMS = 500  # of each format, in arrays
BROKEN_ARRAYS = 20  # of each format

USER = {"role": "user", "content": "What does it mean?"}
ASSISTANT = {"role": "assistant", "content": "That somebody asked a question."}
SPEC = {
    "name": "look",
    "description": "d",
    "parameters": {"type": "object", "properties": {"day": {"type": "number"}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"day": 7, "at": None}}}
SEEDS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "system", "content": "Be short."}, USER, ASSISTANT | {"weight": 1}]},
        {"messages": [USER, ASSISTANT | {"train": False}, USER, ASSISTANT | {"reasoning_content": "Seven."}]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "7", "tool_call_id": "c1", "name": "look"},
                ASSISTANT,
            ],
            "tools": [{"type": "function", "function": SPEC}],
        },
    ],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "喝茶?"}, {"from": "gpt", "value": "咖啡 😀"}],
            "system": "s",
        },
        {
            "conversations": [
                {"from": "human", "value": "How many days?"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"day": 7}}'},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "Seven."},
            ],
            "tools": json.dumps([SPEC]),
        },
    ],
    "alpaca": [
        {"instruction": "A question", "input": "with more", "output": "An answer", "system": "s"},
        {"instruction": "q", "input": "", "output": "a", "history": [["q0", "a0"], ["q1", "a1"]]},
    ],
    "prompt-completion": [
        {"prompt": "A question", "completion": "An answer"},
        {"prompt": [USER], "response": [ASSISTANT], "tools": []},
    ],
    "text": [
        {"text": "Some words, and 3.14159."},
        {"text": "今天\n天气很好", "source": {"url": "x", "n": 1}},
    ],
    "preference": [
        {"prompt": "A question", "chosen": "An answer", "rejected": "Another"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": "No idea."}]},
        {
            "conversations": [{"from": "human", "value": "喝茶?"}],
            "chosen": {"from": "gpt", "value": "咖啡 😀"},
            "rejected": {"from": "gpt", "value": "茶"},
        },
    ],
    "kto": [
        {"prompt": "A question", "completion": "An answer", "label": True},
        {"messages": [USER, ASSISTANT], "label": False},
        {"instruction": "q", "output": "a", "kto_tag": True},
    ],
}

# ---- what goes wrong in a value --------------------------------------------------------------------


class Raw(str):
    """Text that stands in the file as it is, where JSON has a value."""


def nested(depth: int, opening: str = "[", closing: str = "]") -> Raw:
    return Raw(opening * depth + closing * depth)


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2.5,
        [],
        {},
        [[]],
        [None],
        {"": None},
        "",
        " ",
        "\0",
        "null",
        "[]",
        "{",
        "[1",
    ),
    *(
        "\ud800",
        "a\udfffb",
        "\ufeff",
        "\u2028",
        "<｜User｜>",
        "<｜end▁of▁sentence｜>",
        "<think>",
        "\ufdd0x\ufdd1y\ufdd2",
    ),
    *("x" * 20_000, "😀" * 2_000, ["y" * 20_000], {"z" * 20_000: 1}),
    *("User", "admin", "assistant", "gpt", "tool", "system", "function_call", "s" * 5_000),
    *(
        Raw("NaN"),
        Raw("Infinity"),
        Raw("-Infinity"),
        Raw("1e999"),
        Raw("9" * 4_000),
        Raw("9" * 5_000),
        Raw("-0"),
    ),
    *(Raw('"\\ud800"'), Raw('"\\u0000"'), Raw('{"a": 1, "a": 2}'), Raw('{"role": "user", "role": []}')),
    *(nested(depth) for depth in (30, 300, 900, 980, 1_500, 100_000)),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in (30, 300, 900, 980, 1_500, 100_000)),
)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within."""
    yield place
    if isinstance(value, dict | list):
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(member, (*place, key))


def replaced(row: Any, chance: random.Random) -> Any:
    place = chance.choice(list(places(row)))
    if not place:
        return chance.choice(ODD)
    parent_of(row, place)[place[-1]] = chance.choice(ODD)
    return row


def without_one(row: Any, chance: random.Random) -> Any:
    place = chance.choice(list(places(row))[1:])
    del parent_of(row, place)[place[-1]]
    return row


def renamed(row: Any, chance: random.Random) -> Any:
    place = chance.choice([place for place in places(row) if place and isinstance(place[-1], str)])
    parent, key = parent_of(row, place), place[-1]
    parent[chance.choice((key[:-1], key.upper(), f" {key}", key + "\ud800", "x" * 3_000, ""))] = parent.pop(
        key
    )
    return row


def wrapped(row: Any, chance: random.Random) -> Any:
    place = chance.choice(list(places(row))[1:])
    parent = parent_of(row, place)
    value = parent[place[-1]]
    parent[place[-1]] = chance.choice(([value], {"value": value}, [value, value], json.dumps(value)))
    return row


def disordered(row: Any, chance: random.Random) -> Any:
    lists = [place for place in places(row) if isinstance(at(row, place), list)]
    if lists:
        items = at(row, chance.choice(lists))
        chance.shuffle(items)
        items += items[: chance.randrange(3)]
    return row


def parent_of(row: Any, place: tuple[Any, ...]) -> Any:
    return at(row, place[:-1])


def at(row: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        row = row[key]
    return row


CHANGES = (replaced, replaced, replaced, without_one, renamed, wrapped, disordered)


def changed(format: str, chance: random.Random) -> bytes:
    """A row as JSON, with a change or two; one in ten is as it should be."""
    row = copy.deepcopy(chance.choice(SEEDS[format]))
    for _ in range(chance.choice((0, *[1] * 6, *[2] * 3))):
        try:
            row = chance.choice(CHANGES)(row, chance)
        except IndexError:  # nothing is left of it that could be changed
            break
    return as_json(row, ascii_only=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def as_json(value: Any, ascii_only: bool) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        members = (
            f"{json.dumps(k, ensure_ascii=ascii_only)}: {as_json(v, ascii_only)}" for k, v in value.items()
        )
        return "{" + ", ".join(members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_json(item, ascii_only) for item in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


# ---- what goes wrong in a text ---------------------------------------------------------------------


def cut_off(text: bytes, chance: random.Random) -> bytes:
    return text[: chance.randrange(1, max(2, len(text)))]


def with_a_byte(text: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(text))
    bad = chance.choice((b"\xff", b"\xe9", b"\xc0\x80", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80"))
    return text[:place] + bad + text[place:]


def without_a_mark(text: bytes, chance: random.Random) -> bytes:
    marks = [place for place, byte in enumerate(text) if byte in b'{}[]",:']
    place = chance.choice(marks or [len(text)])
    return text[:place] + text[place + 1 :]


def twice(text: bytes, chance: random.Random) -> bytes:
    return text + chance.choice((b"", b" ", b",", b"\t")) + text


def key_again(text: bytes, chance: random.Random) -> bytes:
    keys = re.findall(rb'"\w+"(?=: )', text) or [b'"text"']
    return (
        text[:1]
        + chance.choice(keys)
        + b": "
        + chance.choice((b"null", b"1", b'"again"', b"[]"))
        + b", "
        + text[1:]
    )


DAMAGES = (cut_off, with_a_byte, without_a_mark, twice, key_again)

# ---- what becomes of them --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """What became of the rows of a file, by their place in it."""

    used: set[int]
    rejected: dict[int, str]
    fatal: list[int]


@pytest.fixture(scope="module")
def fate_of(tiny_models: dict[str, Path]) -> Callable[[Path, str], Fate]:
    """Takes a file the way that the preparation takes it, without Ray."""

    def follow(path: Path, format: str) -> Fate:
        found = Inputs.find(DataConfig.model_validate({"sources": [{"path": str(path), "format": format}]}))
        job = Job(
            inputs=found.items,
            sources=found.sources,
            tokenizer=TokenizerSpec(str(tiny_models["qwen2"])),
            seq_len=1 << 20,  # nothing is too long
            on_long_row="truncate",
            last_turn_only=False,
            thinking="auto",
            seed=0,
            num_buckets=1,
            chunk_chars=1 << 18,
            scratch=str(path.with_suffix(".scratch")),
            target="",
        )
        tallies = [
            tally
            for task in read_chunks([0], job, frozenset(), 1 << 20)
            for _, tally in encode_chunks(task, job)
        ]
        rejected = [row for tally in tallies for row in tally.rejected]
        docs = bucket_documents(job, 0).column("doc").to_pylist()
        fate = Fate(
            used={file_and_row(doc)[1] for doc in docs},
            rejected={row["row"] - 1: row["reason"] for row in rejected},
            fatal=[row["row"] - 1 for row in rejected if row["fatal"]],
        )
        assert len(fate.rejected) == len(rejected)
        assert fate.used.isdisjoint(fate.rejected)
        assert sum(tally.num_rows for tally in tallies) == len(fate.used) + len(fate.rejected)
        return fate

    return follow


_OF_PYTHON = re.compile(
    r"object (has|is)|not (iterable|subscriptable)|indices|unhashable|NoneType|Traceback|<class|\bstr\b"
)
_NAMES = re.compile(
    r"'\w|(message|tool|pair|line) \d|the row|the chat template|assistant message|system prompt|its answers|nested too"
)


def assert_tells(reason: str) -> None:
    """It names what is wrong, fits a line or three of a terminal, and can be written to a file."""
    assert _NAMES.search(reason), reason
    assert not _OF_PYTHON.search(reason), reason
    assert len(reason) < 600, reason
    assert reason.isprintable(), reason


@pytest.mark.parametrize("format", FORMATS)
def test_lines(tmp_path: Path, fate_of: Callable[[Path, str], Fate], format: str) -> None:
    """Values and texts damaged, a line each: none costs another."""
    chance = random.Random(f"lines of {format}")
    lines = [changed(format, chance) for _ in range(LINES)]
    lines = [chance.choice(DAMAGES)(line, chance) if chance.random() < 0.3 else line for line in lines]
    lines[0] = b"\xef\xbb\xbf" + as_json(SEEDS[format][0], ascii_only=False).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    fate = fate_of(path, format)
    assert fate.used | fate.rejected.keys() == set(range(LINES))
    assert 0 in fate.used
    assert fate.fatal == []
    assert LINES // 10 < len(fate.used) < LINES * 9 // 10  # or the damage would be none, or all there is
    for reason in fate.rejected.values():
        assert_tells(reason)


@pytest.mark.parametrize("format", FORMATS)
def test_items_of_an_array(tmp_path: Path, fate_of: Callable[[Path, str], Fate], format: str) -> None:
    """Values damaged: each costs itself. What Python's JSON refuses ends the file, so that stands in lines only."""
    chance = random.Random(f"items of {format}")
    items = [as_json(SEEDS[format][0], ascii_only=True).encode()]
    while len(items) < ITEMS:
        item = changed(format, chance)
        if is_json(item):
            items.append(item)
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",\n".join(items) + b"]")
    fate = fate_of(path, format)
    assert fate.used | fate.rejected.keys() == set(range(ITEMS))
    assert fate.fatal == []
    assert ITEMS // 10 < len(fate.used) < ITEMS * 9 // 10
    for reason in fate.rejected.values():
        assert_tells(reason)


@pytest.mark.parametrize("format", FORMATS)
def test_broken_arrays(tmp_path: Path, fate_of: Callable[[Path, str], Fate], format: str) -> None:
    """A text damaged: the rows before it are used, and the file's end is told at the row that was damaged."""
    chance = random.Random(f"arrays of {format}")
    whole = [as_json(row, ascii_only=True).encode() for row in SEEDS[format]]
    broken = 0
    for number in range(BROKEN_ARRAYS):
        items = whole + whole
        place = chance.randrange(1, len(items))
        items[place] = chance.choice((cut_off, without_a_mark))(items[place], chance)
        path = tmp_path / f"{number}.json"
        path.write_bytes(b"[" + b",\n".join(items) + b"]")
        fate = fate_of(path, format)
        if is_json(path.read_bytes()):
            assert fate.used | fate.rejected.keys() == set(range(len(items)))
            continue
        broken += 1
        assert set(range(place)) <= fate.used
        (last,) = fate.fatal
        assert fate.used | fate.rejected.keys() == set(range(last + 1))
        assert_tells(fate.rejected[last])
        assert "malformed JSON at line" in fate.rejected[last]
        # a quote or bracket that is gone may be found only where the next row begins
        assert place <= last <= place + 1
    assert broken > BROKEN_ARRAYS // 2


def test_every_depth(tmp_path: Path, fate_of: Callable[[Path, str], Fate]) -> None:
    """Where Python's stack ends is different for each function that goes down into a value."""
    rows = []
    for depth in range(1, 1001, 3):
        call = {"name": "look", "arguments": {"day": Raw('{"a": [' * depth + "1" + "]}" * depth)}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        rows.append(as_json({"messages": messages}, ascii_only=True))
    path = tmp_path / "deep.jsonl"
    path.write_text("\n".join(rows))
    fate = fate_of(path, "messages")
    assert fate.used | fate.rejected.keys() == set(range(len(rows)))
    assert 10 < len(fate.used) < 20  # not as far as the stack goes, which is another in each process
    assert fate.used == set(range(len(fate.used)))
    for reason in fate.rejected.values():
        assert_tells(reason)


def is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True
