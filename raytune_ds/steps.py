"""The rows of any step of a run, for people: those that were trained on, and those that will be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from raytune_ds.console import say
from raytune_ds.data.rows import Document, Origin, origins, step_rows
from raytune_ds.data.store import Store, file_and_row
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.trained import Trained

TEXT_CHARS = 80
TEXT_TOKENS = 40


def show_steps(path: str, steps: Sequence[int]) -> None:
    """Prints slot, file, row and line of each document of some steps, and how it begins where that can be read.

    Raises:
        UserError: no such run, its prepared data are gone, or a step is below 1.
    """
    if wrong := [step for step in steps if step < 1]:
        raise UserError(f"--step {wrong[0]}: the first step is 1.")
    trained = Trained.read(path)
    try:
        found = {step: step_rows(trained.store, trained.order, step) for step in dict.fromkeys(steps)}
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{trained.store.path}: can't be read: {error}") from error
    docs = {document.doc for rows in found.values() for document in rows.documents}
    places = origins(trained.store, docs)
    begins = _beginnings(trained.store)
    for step, rows in found.items():
        epoch, step_in_epoch = trained.order.epoch_and_step(step - 1)
        say(
            f"step {step}: step {step_in_epoch + 1} of {trained.order.steps_per_epoch} in epoch {epoch + 1}, "
            f"{len(rows.documents)} documents, batch {rows.batch}; {_fate(trained, step, rows.batch)}",
            style="bold",
        )
        for document in rows.documents:
            origin = places[document.doc]
            text = begins(document, origin)
            say(
                f"  slot {document.slot}: {origin}, {len(document.ids)} tokens"
                + (f": {_short(text)}" if text else "")
            )


def _fate(trained: Trained, step: int, batch: str) -> str:
    """What became of a step."""
    row = next((row for row in trained.rows if row["step"] == step), None)
    if row is None:
        end = trained.total_steps
        return "not trained on yet" if step <= end else f"not trained on; the run ends with step {end}"
    if row.get("left_out"):
        return "left out"
    if "batch" in row and row["batch"] != batch:
        return f"it was trained on another batch, {row['batch']}"
    return "read, but not applied" if row.get("skipped") else "trained on"


def _beginnings(store: Store) -> Callable[[Document, Origin], str | None]:
    """How documents begin: as their row does, but pieces of long texts from their own tokens."""

    def begins(document: Document, origin: Origin) -> str | None:
        file, _ = file_and_row(document.doc)
        is_text = store.manifest.formats[store.manifest.files[file]] == "text"
        if not (is_text and store.manifest.num_split):
            return origin.text
        try:
            tokenizer = load_tokenizer(TokenizerSpec(store.manifest.tokenizer))
        except UserError:
            return f"(a piece of) {origin.text}" if origin.text else None
        return str(tokenizer.decode(document.ids[:TEXT_TOKENS].tolist(), skip_special_tokens=True))

    return begins


def _short(text: str) -> str:
    line = " ".join(text[: 2 * TEXT_CHARS].split())
    return line if len(line) <= TEXT_CHARS and len(text) <= 2 * TEXT_CHARS else line[:TEXT_CHARS] + " ..."
