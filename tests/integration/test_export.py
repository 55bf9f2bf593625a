"""`raytune-ds export` of runs that were really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from raytune_ds import cli
from tests.helpers import Run, write_jsonl

ROWS = [
    {"prompt": f"Name colour {i}", "completion": f"colour {i} is {colour}"}
    for i, colour in enumerate(["red", "green", "blue", "grey"] * 8)
]
# In a process of its own: neither raytune_ds nor its settings of torch are there.
LOGITS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, adapter = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
messages = [{"role": "user", "content": "Name colour 7"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
with torch.no_grad():
    print(json.dumps(model.eval()(input_ids=ids).logits[0, -1].tolist()))
"""


def logits(folder: Path, adapter: Path | str = "") -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, str(folder), str(adapter)], capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


def test_a_finished_run_is_merged(run: Run, tmp_path: Path, capsys: Any) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    settings = [f"data.sources=[{data}]", "data.seq_len=64", "scaling.num_workers=1", "train.global_batch=4"]
    result = run(
        *settings,
        "run.name=tuned",
        "adapter.use_rslora=true",
        "train.max_steps=6",
        "train.learning_rate=5e-3",
    )
    assert result.status == "finished"
    folder = Path(result.run)
    for kind in ("merged", "gguf-ready"):
        assert cli.main(["export", "--run", str(folder), "--to", kind]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "compared with the adapter on its base model, text of the run's data" in said
    base = json.loads((folder / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    found, expected, before = logits(folder / "exports/merged"), logits(base, folder / "final"), logits(base)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert max(abs(a - b) for a, b in zip(before, expected, strict=True)) > 1e-2
    card = (folder / "exports/merged/README.md").read_text()
    for name in (
        "run",
        "base model",
        "base model's fingerprint",
        "data fingerprint",
        "seed",
        "merged tensors",
    ):
        assert f"\n| {name} | " in card.partition("## Export")[2]
    # Should the base model have changed, nothing is merged into it.
    config = Path(base) / "config.json"
    text = config.read_text()
    config.write_text(text + "\n")
    assert (
        cli.main(["export", "--run", str(folder), "--to", "merged", "--output", str(tmp_path / "again")]) == 2
    )
    config.write_text(text)
    assert "its files have changed since" in " ".join(capsys.readouterr().err.split())
