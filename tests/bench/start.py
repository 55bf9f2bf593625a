"""How long it takes from a command to the end of the first optimizer step, beside a bare script that imports torch,
transformers and peft, loads the same model, puts LoRA on it and does one step.

Ours is `python -m raytune_ds.train` on a running cluster with a prepared store. The two alternate, each in a process of
its own, and what counts is the ratio of the medians.

    python -m tests.bench.start [ALTERNATIONS]
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytune_ds.console import say, table

ALTERNATIONS = 5
SEQ_LEN = 512
# As the bare script, which torch gives as many threads as there are CPUs: two on the cluster of this bench.
BOTH_CPUS = ("scaling.cpus_per_worker=2",)
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
"""Of a qwen2 of 75 million parameters."""

# Ray would make a token, and find it later.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}

BARE = f"""
import sys, time
import torch, transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
ids = torch.randint(10, 1000, (1, {SEQ_LEN}))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print(time.monotonic())
"""


def main(alternations: int = ALTERNATIONS) -> None:
    """Prints the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster ends with it
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="rds") as scratch, cluster(Path(scratch)) as address:
        root = Path(scratch)
        inputs(root)
        _ours(root, address, "first")  # prepares the store, and fills the file cache
        _bare(root)
        bare, ours, phases = list[float](), list[float](), list[dict[str, float]]()
        for turn in range(alternations):
            bare.append(_bare(root))
            marks = _ours(root, address, f"turn{turn}")
            ours.append(marks["first step done"])
            phases.append(marks)
            say(f"pair {turn + 1}: {bare[-1]:.2f} and {ours[-1]:.2f} s, ratio {ours[-1] / bare[-1]:.2f}")
    _show(bare, ours, phases)


def _show(bare: list[float], ours: list[float], phases: list[dict[str, float]]) -> None:
    ratio = statistics.median(ours) / statistics.median(bare)
    table(
        f"From the command to the end of the first step, {len(bare)} alternations",
        ["", "median s", "least", "most", "ratio"],
        [
            ["bare script", *(f"{f(bare):.2f}" for f in (statistics.median, min, max)), "1.00"],
            ["raytune_ds.train", *(f"{f(ours):.2f}" for f in (statistics.median, min, max)), f"{ratio:.2f}"],
        ],
    )
    rows, before = list[list[str]](), 0.0
    for name in phases[0]:
        at = statistics.median(marks[name] for marks in phases)
        rows.append([name, f"{at:.2f}", f"{at - before:.2f}"])
        before = at
    table("Where ours goes (medians)", ["until", "s since the command", "s"], rows)


def inputs(root: Path, shape: dict[str, Any] = SHAPE) -> None:
    """A model and rows to train it on, below `root`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raytune_ds.demo.data import general_rows, write_rows
    from raytune_ds.model import tiny

    rows = list(general_rows())[:300]
    tokenizer = tiny.train_tokenizer([row["instruction"] + row["output"] for row in rows])
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **shape, vocab_size=16_000)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_rows(rows, root / "rows.jsonl")


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[str]:
    """A Ray of its own, which ends with it; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
    command += ["--port", str(port), "--temp-dir", str(root / "ray"), "--include-dashboard", "false"]
    command += ["--disable-usage-stats"]
    with (root / "ray.log").open("w") as log:
        ray = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})
        try:
            while "Ray runtime started" not in (root / "ray.log").read_text():
                assert ray.poll() is None, (root / "ray.log").read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            ray.send_signal(signal.SIGTERM)
            ray.wait()


def settings(root: Path, name: str, seq_len: int = SEQ_LEN) -> list[str]:
    """A run of one step, as key=value."""
    return [
        f"run.storage={root}/runs",
        f"run.name={name}",
        f"model.name={root}/model",
        f"data.sources=[{root}/rows.jsonl]",
        "data.eval.fraction=0",
        f"data.seq_len={seq_len}",
        "scaling.num_workers=1",
        "train.global_batch=1",
        "train.max_steps=1",
    ]


def _ours(root: Path, address: str, name: str) -> dict[str, float]:
    """Seconds since the command at which each phase ended."""
    command = [sys.executable, "-m", "raytune_ds.train", *settings(root, name), *BOTH_CPUS]
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((root / "runs" / name / "result.json").read_text())
    marks: dict[str, float] = result["startup_s"]
    return marks


def _bare(root: Path) -> float:
    """Seconds from the command to the end of its step."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(root / "model")], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1]) - started


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
