"""TRL's SFTTrainer, with whatever settings the case asks for."""

from __future__ import annotations

from tests.bench import protocol

if __name__ == "__main__":
    protocol.own_stdout()

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.bench.peers.case import told
    from tests.bench.peers.hf import Told, arguments, load, lora, tokenizer

    case, passes = told(), protocol.Passes()
    model = load(case)
    rows = case.rows()
    longest = max(len(row["input_ids"]) for row in rows)
    config = SFTConfig(
        **{
            # No document is cut. Where packs are fewer than documents, the end of an epoch ends the step.
            "max_length": max(longest, case.seq_len),
            **arguments(case, len(rows), case.options["batch"]),
        }
    )
    SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(case),
        callbacks=[Told(passes)],
    ).train()
