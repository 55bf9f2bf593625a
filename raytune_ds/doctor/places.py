"""Whether `run.storage` is one place for all nodes."""

from __future__ import annotations

import time
import uuid

from raytune_ds import storage
from raytune_ds.errors import first_line

# A network file system may show a new file late.
PATIENCE_S = 2.0


def leave_mark(root: str) -> str:
    """Writes a small file below `root`, to be looked for from elsewhere; returns its path.

    Raises:
        OSError: it can't be written there.
        pyarrow.ArrowInvalid: a scheme pyarrow does not know.
    """
    mark = f"{root}/.seen-{uuid.uuid4().hex}"
    storage.write_bytes(mark, b"")
    return mark


def remove_mark(mark: str) -> None:
    """Deletes it."""
    filesystem, inner = storage.open_filesystem(mark)
    filesystem.delete_file(inner)


def trouble(root: str, mark: str) -> str | None:
    """Why this node can't work with `root`, where another has left `mark`; None if it can."""
    try:
        end = time.monotonic() + PATIENCE_S
        while not storage.exists(mark):
            if time.monotonic() > end:
                return "does not see what another node wrote there"
            time.sleep(0.1)
        storage.check_writable(root)
    except (OSError, ValueError) as error:
        return f"can't write there: {first_line(error)}"
    return None
