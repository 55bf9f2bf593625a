"""TRL's SFTTrainer, with whatever settings the case asks for."""

from __future__ import annotations

from tests.bench import protocol

if __name__ == "__main__":
    protocol.own_stdout()

    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from tests.bench.peers.case import told
    from tests.bench.peers.hf import Told, arguments, load, lora

    case, passes = told(), protocol.Passes()
    model = load(case)
    rows = case.rows()
    longest = max(len(row["input_ids"]) for row in rows)
    config = SFTConfig(
        **{
            **arguments(case, len(rows), case.options["batch"]),
            # A pass is one step, however many packs there are: an epoch's end is a step's, too.
            "max_length": max(longest, case.options.get("seq_len", 0)),
            "dataset_kwargs": {"skip_prepare_dataset": False},
        }
    )
    # It is asked for, and has nothing to do: the rows are ids already.
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(case),
        callbacks=[Told(passes)],
    ).train()
