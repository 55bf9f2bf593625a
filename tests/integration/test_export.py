"""`raytune-ds export` of runs that were really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from raytune_ds import cli
from tests.integration.conftest import Colours

# In a process of its own: neither raytune_ds nor its settings of torch are there.
LOGITS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(model, tokenizer):
    messages = [{"role": "user", "content": "Name colour 7"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, -1].tolist()

found, base = (
    logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder))
    for folder in sys.argv[1:3]
)
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
adapted = logits(PeftModel.from_pretrained(model, sys.argv[3]), AutoTokenizer.from_pretrained(sys.argv[3]))
print(json.dumps([found, base, adapted]))
"""


def logits(*folders: Path) -> list[list[float]]:
    """Of a merged model, of a base model, and of that with an adapter."""
    command = [sys.executable, "-c", LOGITS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_a_finished_run_is_merged(colours: Colours, tmp_path: Path, capsys: Any) -> None:
    assert colours.result.status == "finished"
    folder = Path(colours.result.run)
    for kind in ("merged", "gguf-ready"):
        assert cli.main(["export", "--run", str(folder), "--to", kind]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "compared with the adapter on its base model, text of the run's data" in said
    base = json.loads((folder / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    found, before, expected = logits(folder / "exports/merged", Path(base), folder / "final")
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
    code = cli.main(["export", "--run", str(folder), "--to", "merged", "--output", str(tmp_path / "again")])
    config.write_text(text)
    assert code == 2
    assert "its files have changed since" in " ".join(capsys.readouterr().err.split())
