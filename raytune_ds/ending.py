"""How a worker ended, as it tells the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a worker ended.

    Attributes:
        error: what the user has to mend; None if all went well.
        progress: where the run stands.
        peak_memory_mib: the most memory each rank held: of the GPU, or the process.
        engine: that was taken.
        trainable: parameters that were trained.
        final_bytes: size of final/.
        stopped: whether it was ended early, by its judge; it has no final/ then.
        num_workers: at the end.
    """

    error: str | None = None
    progress: dict[str, Any] | None = None
    peak_memory_mib: tuple[float, ...] = ()
    engine: str = ""
    trainable: int = 0
    final_bytes: int = 0
    stopped: bool = False
    num_workers: int = 0
