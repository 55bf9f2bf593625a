"""`raytune-ds export`: what a run has left, made ready to be taken elsewhere, and compared before it is called good.

It is written beside its place and renamed, so that a directory of that name is complete, or not there.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raytune_ds import gguf
from raytune_ds.console import ProgressLine, say, warn
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.logits import compare
from raytune_ds.merge import Merged
from raytune_ds.model.weights import Weights
from raytune_ds.modelcard import exported_card
from raytune_ds.modelfiles import Compared, ExportError, num_bytes, save_configs, write_weights
from raytune_ds.origin import Origin, base_folder
from raytune_ds.push import push, token_for
from raytune_ds.tensorfile import TensorFile
from raytune_ds.tuned import dtype_to_compare_in, load_tuned
from raytune_ds.world import World
from raytune_ds.wrapped import ADAPTER_FILE, config_of, load_adapter

LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# For the comparison where the data of the run are gone.
TEXTS = (
    "The committee shall publish its findings within thirty days, and either party may ask for a second hearing.",
    "A fever that lasts more than three days, or comes with a stiff neck, should be seen by a doctor at once.",
    "def total(prices):\n    return sum(price for price in prices if price is not None)\n",
    "机器学习模型在新的领域里往往需要少量的数据进行微调，然后再部署到服务器上。",
)


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        to: adapter, merged or gguf-ready.
        target: the directory to make.
        compare: whether a merged model is compared with its adapter by their logits.
        push: ORG/NAME of the hub to upload to.
        private: of a repository that is made for it.
    """

    to: str
    target: Path
    compare: bool = True
    push: str | None = None
    private: bool = False


def deliver(origin: Origin, request: Request) -> None:
    """Makes the directory that is asked for, and uploads it.

    Raises:
        UserError: it can't be made; nothing is left of it.
    """
    token = token_for(request.push) if request.push else None
    if request.to == "adapter" and origin.base is None:
        raise UserError(
            "--to adapter: the run trained all parameters, so there is none; --to merged is its model."
        )
    with _staged(request.target) as staging:
        notes = _adapter(origin, staging) if request.to == "adapter" else _model(origin, request, staging)
        _licenses(origin, staging)
    for note in notes:
        say(note)
    say(f"{request.to} in {request.target}")
    if request.to == "gguf-ready":
        say(
            f"next, in a checkout of llama.cpp: {gguf.next_command(request.target, _config(request.target)['dtype'])}"
        )
    if request.push and token:
        say(f"pushed: {push(request.target, request.push, token, request.private)}")


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end; one that fails leaves nothing."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target}: is there already; choose another, or move it away.")
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
        yield staging
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except (ExportError, OSError) as error:
        full = os.strerror(errno.ENOSPC) in str(error)
        reason = "the disk is full. Make room there, or choose another --output" if full else str(error)
        raise UserError(f"{target}: can't be exported: {reason}. Nothing is left of it.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# -------------------------------------------------------------------------------------------- adapters


def _adapter(origin: Origin, staging: Path) -> list[str]:
    _copy(origin.folder, staging)
    tensors = load_adapter(staging / ADAPTER_FILE)
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ExportError(f"{bad[0]} is not finite")
    assert origin.base is not None
    held = origin.base.quantization
    on = origin.base.name + ("" if held == "none" else f", held in {held}")
    facts = [*origin.facts, ("loads with", f"peft, on {on}")]
    _write_card(origin, staging, "peft", "The adapter, as it was trained.", facts)
    if held == "none":
        return []
    return [
        f"for the base model held in {held}, as in training: on the unquantised one it answers a little differently; "
        "--to merged is right without it"
    ]


def _copy(source: Path, target: Path) -> None:
    """All files of a folder, each read back."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    _require_room(target, total)
    with _Progress("copying", total) as progress:
        for file in files:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            if not filecmp.cmp(file, place, shallow=False):
                raise ExportError(f"{place.name} is not read back as it was written")
            progress.add(file.stat().st_size)


# ---------------------------------------------------------------------------------------------- models


def _model(origin: Origin, request: Request, staging: Path) -> list[str]:
    if origin.base is None:
        notes, facts = _whole(origin, request, staging)
        kind, title = "", "The model, as it was trained."
    else:
        notes, facts = _merge(origin, request, staging)
        kind = str(config_of(origin.folder)["peft_type"]).lower()
        title = f"The adapter, merged into its base model {origin.base.name}."
    _write_card(origin, staging, "transformers", title, [*origin.facts, *facts], kind)
    return notes


def _whole(origin: Origin, request: Request, staging: Path) -> tuple[list[str], list[tuple[str, str]]]:
    if request.to == "gguf-ready":
        gguf.require_known(_config(origin.folder)["architectures"][0])
    _copy(origin.folder, staging)
    if request.to != "gguf-ready":
        return [], []
    files = [TensorFile(str(path)) for path in sorted(staging.glob("*.safetensors"))]
    dtypes = {file.dtype(name) for file in files for name in file.shapes}
    rows = next(shape[0] for file in files for name, shape in file.shapes.items() if "embed_tokens" in name)
    return _for_gguf(origin, staging, rows, dtypes), []


def _merge(origin: Origin, request: Request, staging: Path) -> tuple[list[str], list[tuple[str, str]]]:
    assert origin.base is not None
    merged = Merged(origin.base, origin.folder, origin.revision)
    if request.to == "gguf-ready":
        gguf.require_known(type(merged.model).__name__)
    size = num_bytes(merged)
    _require_room(staging, size)
    # What is written is read back: the way is twice as long as the files.
    with _Progress("merging", 2 * size) as progress:
        write_weights(str(staging), merged.model, _Watched(merged, progress), World.alone(), progress.add)
    save_configs(staging, merged.model, merged.folder, merged.main_dtype)
    tokenizer = _tokenizer(origin)
    tokenizer.save_pretrained(staging)
    notes = [f"merged {len(merged.merged)} of {len(merged.shapes)} tensors, in {_short(merged.main_dtype)}"]
    if merged.untied:
        notes.append(
            f"the base model ties {', '.join(merged.untied)} to its embedding; the adapter makes them differ, so the "
            "merged model has both (tie_word_embeddings: false)"
        )
    if request.to == "gguf-ready":
        dtypes = {merged.dtype(name) for name in merged.shapes}
        rows = int(merged.model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type,index]
        notes += _for_gguf(origin, staging, rows, dtypes)
    facts = [
        ("adapter", merged.kind),
        ("merged", f"layer by layer by peft, in float32, rounded once to {_short(merged.main_dtype)}"),
        ("merged tensors", f"{len(merged.merged):,} of {len(merged.shapes):,}"),
    ]
    if not request.compare:
        warn("not compared with the adapter (--no-compare)")
        return notes, [*facts, ("compared with the adapter", "no")]
    compared = compare(
        staging,
        partial(load_tuned, origin.base, origin.revision, origin.folder),
        merged.main_dtype,
        size,
        origin.documents or _documents(tokenizer),
        origin.base.trust_remote_code,
        dtype_to_compare_in(origin.base),
    )
    where = "text of the run's data" if origin.documents else "a built-in text"
    notes.append(f"compared with the adapter on its base model, {where}: {compared}")
    return notes, [*facts, ("compared with the adapter", f"{where}: {compared}")]


def _documents(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def _for_gguf(origin: Origin, staging: Path, rows: int, dtypes: set[torch.dtype]) -> list[str]:
    tokenizer = _tokenizer(origin)
    gguf.prepare(staging, base_folder(origin) or origin.folder, tokenizer)
    return gguf.check(staging, rows, dtypes, bool(tokenizer.chat_template))


class _Watched:
    """Tensors that tell of those that were compared."""

    def __init__(self, tensors: Merged, progress: _Progress) -> None:
        self._tensors, self._progress = tensors, progress
        self.shapes, self.dtype = tensors.shapes, tensors.dtype

    def __call__(self, name: str) -> torch.Tensor:
        return self._tensors(name)

    def compare(self, name: str, saved: Weights) -> Compared:
        found = self._tensors.compare(name, saved)
        self._progress.add(self.shapes[name].numel() * self.dtype(name).itemsize)
        return found


# ---------------------------------------------------------------------------------- what lies beside it


def _tokenizer(origin: Origin) -> Any:
    model = origin.base or origin.began_with
    trust = model is not None and model.trust_remote_code
    return load_tokenizer(TokenizerSpec(str(origin.folder), None, trust))


def _write_card(
    origin: Origin, staging: Path, library: str, title: str, facts: list[tuple[str, str]], kind: str = ""
) -> None:
    there = origin.folder / "README.md"
    card = there.read_text(encoding="utf-8") if there.is_file() else ""
    text = exported_card(card, library, title, facts, kind)
    (staging / "README.md").write_text(text, encoding="utf-8")


def _licenses(origin: Origin, staging: Path) -> None:
    """The base model's, as its makers ask for."""
    model = origin.base or origin.began_with
    if model is None or model.name.startswith("tiny:"):
        return
    there = Path(model.name).expanduser()
    folder = there if there.is_dir() else _licenses_of_the_hub(model.name, origin.revision)
    found = [] if folder is None else [file for pattern in LICENSES for file in folder.glob(pattern)]
    for file in found:
        if file.is_file():
            shutil.copyfile(file, staging / file.name)


def _licenses_of_the_hub(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    for local_only in (False, True):  # without a network, what is in the cache will do
        with contextlib.suppress(Exception):
            return Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=[*LICENSES], local_files_only=local_only
                )
            )
    warn(
        f"the licence of {name} can't be fetched from the hub; put it beside the export before you pass it on"
    )
    return None


# -------------------------------------------------------------------------------------------- the room


def _require_room(folder: Path, size: int) -> None:
    """Asks before anything is written.

    Raises:
        UserError: the disk has too little room.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder.parent}: {size / 1e9:,.1f} GB are needed, and {free / 1e9:,.1f} GB are free. "
            "Make room there, or choose another --output."
        )


class _Progress:
    """Bytes done, with their rate."""

    def __init__(self, label: str, total: int) -> None:
        self._line, self._done, self._started = ProgressLine(label, total), 0, time.monotonic()

    def __enter__(self) -> _Progress:
        self._line.__enter__()
        self._line.update(0, "")
        return self

    def __exit__(self, *error: Any) -> None:
        self._line.__exit__(*error)

    def add(self, nbytes: int) -> None:
        """`nbytes` more are done."""
        self._done += nbytes
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        self._line.update(self._done, f"{rate / 1e6:,.0f} MB/s")


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
