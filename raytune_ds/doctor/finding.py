"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "bad", "absent"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        name: what was looked at.
        status: ok; warn: some runs will miss it; bad: runs will fail or crawl; absent: not there, and not needed.
        found: what is there.
        advice: what to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    advice: str = ""
