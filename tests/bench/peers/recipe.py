"""The recipe of the tutorials: transformers.Trainer, peft, and a collator that pads to the longest row of a batch."""

from __future__ import annotations

from typing import Any

from tests.bench import protocol

if __name__ == "__main__":
    protocol.own_stdout()

    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from tests.bench.peers.case import told
    from tests.bench.peers.hf import Told, arguments, load, lora

    case, passes = told(), protocol.Passes()
    model, adapter = load(case), lora(case)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    rows = case.rows()

    def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As DataCollatorForSeq2Seq does, which wants a tokenizer."""
        longest = max(len(f["input_ids"]) for f in features)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([f[key] + [value] * (longest - len(f[key])) for f in features])

        mask = [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }

    Trainer(
        model=model,
        args=TrainingArguments(**arguments(case, len(rows), case.options["batch"])),
        train_dataset=rows,
        data_collator=pad,
        callbacks=[Told(passes)],
    ).train()
