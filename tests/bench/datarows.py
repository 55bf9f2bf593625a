"""Rows for the bench of the preparation: real ones where there is a folder of them, else the bundled demo's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ds.demo.data import general_rows

FILES = {"alpaca": "alpaca_en_demo.json", "glaive": "glaive_toolcall_en_demo.json"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of one shape, as many of them as are asked for."""

    name: str
    originals: tuple[Row, ...]

    def write(self, path: Path, count: int) -> Path:
        """`count` rows as JSON lines."""
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._first(count))
        return path

    def texts(self) -> Iterator[str]:
        """What a tokenizer can be trained on."""
        for row in self.originals:
            yield from (turn["value"] for turn in row.get("conversations", ()))
            yield from (row[key] for key in ("instruction", "input", "output", "tools") if key in row)

    def _first(self, count: int) -> Iterator[Row]:
        for number in range(count):
            copy, index = divmod(number, len(self.originals))
            row = self.originals[index]
            yield _varied(row, copy) if copy else row


def rows_of(folder: Path | None) -> list[Rows]:
    """What is there of FILES in `folder`; without any, the questions of the demo."""
    found = [
        Rows(name, tuple(json.loads((folder / file).read_text(encoding="utf-8"))))
        for name, file in FILES.items()
        if folder is not None and (folder / file).exists()
    ]
    return found or [Rows("demo", tuple(general_rows()))]


def _varied(row: Row, copy: int) -> Row:
    """The row with another question, so that no two rows are the same."""
    if "instruction" in row:
        return {**row, "instruction": f"{row['instruction']} (variation {copy})"}
    asked, *others = row["conversations"]
    return {**row, "conversations": [{**asked, "value": f"{asked['value']} (variation {copy})"}, *others]}
