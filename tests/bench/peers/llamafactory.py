"""LLaMA-Factory, as `llamafactory-cli train` runs it: rows that are ids already, as its `tokenized_path` takes them."""

from __future__ import annotations

from tests.bench import protocol

if __name__ == "__main__":
    protocol.own_stdout()

    import shutil
    import tempfile

    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    from tests.bench.peers.case import told
    from tests.bench.peers.hf import Told, arguments, tokenizer

    case, passes = told(), protocol.Passes()
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in case.rows()]
    with tempfile.TemporaryDirectory() as folder:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(f"{folder}/rows")
        shutil.copytree(case.model, f"{folder}/model")
        tokenizer().save_pretrained(f"{folder}/model")
        common = arguments(case, len(rows), case.options["batch"])
        common.pop("train_sampling_strategy")  # shuffles, and a pass is all documents
        run_exp(
            {
                **common,
                "stage": "sft",
                "do_train": True,
                "model_name_or_path": f"{folder}/model",
                "dataset": "unused",
                "tokenized_path": f"{folder}/rows",
                "template": "empty",
                "cutoff_len": max(len(row["input_ids"]) for row in rows),
                "finetuning_type": "lora" if case.lora else "full",
                **(
                    {"lora_target": ",".join(case.lora), "lora_rank": 8, "lora_alpha": 16}
                    if case.lora
                    else {}
                ),
                "flash_attn": "sdpa",
                "output_dir": f"{folder}/out",
                "disable_gradient_checkpointing": True,
            },
            callbacks=[Told(passes)],
        )
