"""The packed store of a config: found, or made, before any process group exists.

To find it takes neither torch nor transformers, whose imports take longer than all else here.
"""

from __future__ import annotations

import time

from raytune_ds import lease
from raytune_ds.config import Config
from raytune_ds.console import human_count, human_time, say
from raytune_ds.data.inputs import Inputs
from raytune_ds.data.job import Job
from raytune_ds.data.prepared import fingerprint_of
from raytune_ds.data.store import Manifest, Store
from raytune_ds.data.tokenizer import TokenizerSpec, traits_of
from raytune_ds.errors import UserError

_MIB = 1 << 20
# Small enough that all CPUs have work; of much data large enough that there are not too many files.
_LEAST_CHUNK = _MIB // 2
_CHUNKS = 1024


def prepare(config: Config, inputs: Inputs, tokenizer: TokenizerSpec, path: str) -> Store:
    """Finds the store of `config` below `path`, or makes it; of several jobs that ask for it at once, one makes it.

    A preparation that was killed goes on where it stood: see chunks.

    Args:
        config: its data section and seed decide the content. Not the objective: whichever takes the rows, they become
            the same tokens and weights.
        inputs: of that section.
        tokenizer: of the model.
        path: the folder of all stores.

    Raises:
        UserError: a source can't be read, a row is bad and `data.on_bad_row` is fail, nothing is left to train on.
    """
    if inputs.has_conversations:
        _require_chat_template(tokenizer)
    fingerprint = fingerprint_of(config, inputs, tokenizer)
    target, scratch = f"{path}/{fingerprint}", f"{path}/.making-{fingerprint}"
    job = _job(config, inputs, tokenizer, target, scratch)
    if (found := _found(job)) is not None:
        return found
    with lease.held(f"{scratch}.json", "preparing the data", patient=True):
        return _found(job) or _made(job, config, fingerprint)


def _found(job: Job) -> Store | None:
    """The store, made before of the same rows, which may have lain elsewhere then."""
    found = Store.find(job.target)
    if found is None:
        return None
    say(f"data: prepared before, {_summary(found.manifest)}")
    return Store(job.target, found.manifest.moved(**job.places))


def _made(job: Job, config: Config, fingerprint: str) -> Store:
    from raytune_ds.data.making import make

    started = time.monotonic()
    manifest = make(job, config, fingerprint)
    say(f"data: {_summary(manifest)}, in {human_time(time.monotonic() - started)}")
    return Store(job.target, manifest)


def _job(config: Config, inputs: Inputs, tokenizer: TokenizerSpec, target: str, scratch: str) -> Job:
    memory = config.data.prepare_memory_mib * _MIB
    return Job(
        inputs=inputs.items,
        sources=inputs.sources,
        tokenizer=tokenizer,
        seq_len=config.data.seq_len,
        on_long_row=config.data.on_long_row,
        last_turn_only=config.data.supervise == "last-turn",
        thinking=config.data.thinking,
        seed=config.run.seed,
        num_buckets=max(1, inputs.text_bytes // memory),
        chunk_chars=max(_LEAST_CHUNK, min(memory // 2, inputs.text_bytes // _CHUNKS)),
        scratch=scratch,
        target=target,
    )


def _require_chat_template(spec: TokenizerSpec) -> None:
    if not traits_of(spec).chats:
        raise UserError(
            f"model.name = {spec.name}: its tokenizer has no chat template, so conversations can't be rendered.\n"
            "Take the chat or instruct version of the model, or set data.chat_template to a .jinja file."
        )


def _summary(manifest: Manifest) -> str:
    """One line on a store."""
    train, held_out = manifest.train, manifest.eval
    room = train.num_packs * manifest.seq_len
    parts = [
        f"{manifest.num_rows:,} rows",
        f"{train.num_packs:,} packs of {manifest.seq_len:,} ({100 * train.num_tokens / room:.1f}% full)",
        f"{human_count(train.num_tokens)} tokens, {100 * train.num_supervised / train.num_tokens:.0f}% supervised",
        f"{held_out.num_docs:,} held out",
    ]
    if manifest.num_truncated:
        parts.append(f"{manifest.num_truncated:,} truncated")
    if manifest.num_dropped_long:
        parts.append(f"{manifest.num_dropped_long:,} dropped as too long")
    if manifest.num_split:
        parts.append(f"{manifest.num_split:,} long texts split")
    if manifest.num_rejected:
        parts.append(f"{manifest.num_rejected:,} bad rows skipped")
    return ", ".join(parts)
