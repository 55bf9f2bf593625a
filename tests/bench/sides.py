"""The preparation and what people do today, each in a process of its own, which can be told to prepare again.

The peer is TRL: `datasets` reads and renders the rows, and `SFTTrainer._prepare_dataset` tokenizes, masks, shuffles and
packs them, as it does for whoever calls the trainer. It is called on a stand-in, because the trainer wants a model.
"""

from __future__ import annotations

import multiprocessing as mp
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

CPUS = 2
SAMPLE_S = 0.2
MIB = 1 << 20

# What the chat template renders of an answer, between the marks by which transformers finds it again.
_ANSWER = "{{- message.content or '' -}}"
_END = "{{- eos_token -}}"

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


@dataclass(frozen=True)
class Work:
    """What is to be prepared, and where the result goes; each time somewhere else, or it would be found made."""

    data: Path
    model: Path
    seq_len: int
    folder: Path


@dataclass(frozen=True)
class Packs:
    """What came out, and how long it took.

    Attributes:
        seconds: from the file to packs on disk.
        used: real tokens of each pack.
        num_supervised: targets that are trained on.
    """

    seconds: float
    used: np.ndarray
    num_supervised: int
    seq_len: int

    @property
    def full(self) -> float:
        """The share of real tokens."""
        return float(self.used.sum() / (len(self.used) * self.seq_len))

    @property
    def full_without_last(self) -> float:
        """The same without the emptiest pack, which decides where there are few of them."""
        rest = len(self.used) - 1
        return float((self.used.sum() - self.used.min()) / (rest * self.seq_len)) if rest else self.full


class Side:
    """A process that prepares whenever it is told to."""

    def __init__(self, name: str, serve: Callable[[Connection], None]) -> None:
        """Starts it; what it imports and starts is not part of any time."""
        self.name = name
        context = mp.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,))
        self._process.start()
        self._pipe.recv()

    def prepare(self, work: Work) -> Packs:
        """Prepares; raises what the process did not get over."""
        self._pipe.send(work)
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def prepare_watched(self, work: Work) -> tuple[Packs, float, float]:
        """The same, and MiB that all its processes held before it and at most during it."""
        before = self._memory()
        with self._peak() as peak:
            packs = self.prepare(work)
        return packs, before, max(peak)

    def stop(self) -> None:
        """Ends the process and those below it."""
        self._pipe.send(None)
        self._process.join()

    @contextmanager
    def _peak(self) -> Iterator[list[float]]:
        seen, done = [self._memory()], threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_S):
                seen.append(self._memory())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()

    def _memory(self) -> float:
        root = psutil.Process(self._process.pid)
        return sum(_own_mib(process.pid) for process in [root, *root.children(recursive=True)])


def _own_mib(pid: int) -> float:
    """Memory that no file backs; of pages it shares, its share. Ray's object store counts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):  # it just ended
        return 0.0
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) / 1024


def serve_ours(pipe: Connection) -> None:
    """Our preparation, on a Ray that is started once."""
    import ray

    from raytune_ds import console
    from raytune_ds.cluster import connect

    console.out.quiet = True
    connect(debug=False)
    _serve(pipe, _ours)
    ray.shutdown()


def serve_peer(pipe: Connection) -> None:
    """TRL's."""
    import datasets
    from trl import SFTTrainer  # noqa: F401  # seconds of imports

    datasets.disable_progress_bars()
    _serve(pipe, _peer)


def _serve(pipe: Connection, prepare: Callable[[Work], Packs]) -> None:
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        try:
            pipe.send(prepare(work))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _ours(work: Work) -> Packs:
    import pyarrow.parquet as pq

    from raytune_ds.compose import compose
    from raytune_ds.data.inputs import Inputs
    from raytune_ds.data.prepare import prepare
    from raytune_ds.data.tokenizer import TokenizerSpec

    started = time.perf_counter()
    settings = (f"data.sources={work.data}", f"data.seq_len={work.seq_len}", "data.eval.fraction=0")
    config = compose([], [f"model.name={work.model}", *settings])
    store = prepare(config, Inputs.find(config.data), TokenizerSpec(str(work.model)), str(work.folder))
    seconds = time.perf_counter() - started
    used: list[int] = []
    for name, _ in store.split("train").shards:
        lengths = (
            pq.read_table(f"{store.path}/{name}", columns=["lengths"]).column("lengths").combine_chunks()
        )
        used += np.add.reduceat(lengths.values.to_numpy(), lengths.offsets.to_numpy()[:-1]).tolist()
    return Packs(seconds, np.array(used), store.split("train").num_supervised, work.seq_len)


def _peer(work: Work) -> Packs:
    import pyarrow.compute as pc
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    started = time.perf_counter()
    rows = Dataset.from_json(str(work.data), cache_dir=str(work.folder))
    conversations = rows.map(
        _messages, num_proc=CPUS, remove_columns=[name for name in rows.column_names if name != "tools"]
    )
    config = SFTConfig(
        output_dir=str(work.folder),
        packing=True,
        max_length=work.seq_len,
        assistant_only_loss=True,
        dataset_num_proc=CPUS,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=_with_marks(str(tokenizer.chat_template)),
        completion_only_loss=False,
    )
    packs: Any = SFTTrainer._prepare_dataset(trainer, conversations, tokenizer, config, True, None, "train")
    seconds = time.perf_counter() - started
    used: list[int] = []
    supervised = 0
    for batch in packs.with_format("arrow").iter(batch_size=64):
        used += pc.list_value_length(batch.column("input_ids")).to_pylist()
        supervised += pc.sum(pc.not_equal(pc.list_flatten(batch.column("labels")), -100)).as_py()
    return Packs(seconds, np.array(used), supervised, work.seq_len)


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    """A call of a function stays the JSON text that it is, which is less work than what we do."""
    if "conversations" in row:
        turns = [(_ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    else:
        asked = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
        turns = [("user", asked), ("assistant", row["output"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _with_marks(template: str) -> str:
    """The template with the marks that `assistant_only_loss` needs, as the user of TRL puts them there."""
    before, answer, rest = template.partition(_ANSWER)
    calls, end, after = rest.partition(_END)
    assert answer
    assert end
    return f"{before}{{%- generation -%}}{answer}{calls}{end}{{%- endgeneration -%}}{after}"
