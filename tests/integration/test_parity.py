"""Our losses are those of the plainest loop there is: one document a forward pass, no packing, no tricks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.helpers import Run, step_losses, write_jsonl

STEPS = 20
GLOBAL_BATCH = 6
LR = 3e-3
SETTINGS = (
    "data.seq_len=128",
    "data.eval.fraction=0",
    f"train.global_batch={GLOBAL_BATCH}",
    "train.micro_batch=2",
    f"train.max_steps={STEPS}",
    f"train.learning_rate={LR}",
    "train.lr_scheduler_type=linear",
    "train.weight_decay=0.01",
    "checkpoint.every_steps=100",
)


def _rows() -> list[dict[str, str]]:
    """Documents of very different lengths, so that the ranks' token counts differ."""
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
    ]
    return [
        {
            "instruction": f"Write {n} words, starting with number {i}: {words[i % 12]}",
            "output": " ".join(words[(i * k + k) % 12] for k in range(n)),
        }
        for i, n in enumerate([3, 40, 7, 25, 60, 12, 5, 33, 18, 9] * 12)
    ]


@cache
def plain_losses(base: str, store_path: str) -> list[float]:
    """Transformers and peft, nothing else: per-step losses on the documents of each global batch."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from raytune_ds.data.store import Store

    store = Store.find(store_path)
    assert store is not None
    order, reader = store.order("train", GLOBAL_BATCH, seed=0), store.reader("train")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step))
    losses = []
    for step in range(STEPS):
        loss_sum, weight = torch.zeros(()), 0.0
        for pack in reader.step(order, step, range(GLOBAL_BATCH)):
            start = 0
            for length in pack["lengths"].tolist():
                span = slice(start, start + length)
                ids, targets_T, weights_T = (
                    torch.tensor(pack[name][span]) for name in ("ids", "targets", "weights")
                )
                logits = model(input_ids=ids.long()[None]).logits[0]
                nll = F.cross_entropy(logits, targets_T.long(), reduction="none")
                loss_sum = loss_sum + (nll * weights_T).sum()
                weight += float(weights_T.sum())
                start += length
        loss = loss_sum / weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def _linear(step: int, warmup: int = round(0.03 * STEPS)) -> float:
    return step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and storage of all runs below: model and packed store are made once."""
    folder = tmp_path_factory.mktemp("parity")
    write_jsonl(folder / "rows.jsonl", _rows())
    return folder


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_losses_equal_the_plain_loop(run: Run, shared: Path, num_workers: int) -> None:
    """Whatever the number of workers: 1e-5 relative over 20 steps."""
    result = run(
        f"run.name=w{num_workers}",
        f"data.sources={shared / 'rows.jsonl'}",
        f"scaling.num_workers={num_workers}",
        *SETTINGS,
        storage=shared,
    )
    base = next((shared / ".models").glob("tiny-deepseek-v3-*"))
    store = next(p.parent for p in (shared / ".prepared").glob("*/manifest.json"))
    expected = plain_losses(str(base), str(store))
    assert step_losses(result.run) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.3, "the plain loop itself learns"
