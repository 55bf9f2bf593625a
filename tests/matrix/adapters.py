"""Every kind of adapter, and every architecture, from the first step to what people load.

`python -m tests.matrix.adapters [PATTERN ...]` prints the table, or the rows whose names match; with
`demo`, what each method costs on the bundled data. A trial trains some
steps, once more from its middle, and once more one step shorter. The last one's final/, in the
hands of plain peft and plain transformers, has to have the loss that the longer run had at its last step, and again
after our own merge was written and read back by transformers. What is refused has to be what is listed here.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.data.batch import read
from raytune_ds.data.store import Store
from raytune_ds.errors import UserError, first_line
from raytune_ds.merge import Merged
from raytune_ds.model import tiny
from raytune_ds.model.load import load_for_generation
from raytune_ds.modelfiles import ExportError, save_configs, write_weights
from raytune_ds.rundir import RunDir
from raytune_ds.world import World
from tests.alone import assignment, prepared, work

STEPS, MIDDLE = 20, 8
BASE = {"r": 4, "alpha": 8.0}
# Without pvera, which computes with noise in training and without it afterwards.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": BASE,
    "rslora": BASE | {"use_rslora": True},
    "dora": BASE | {"use_dora": True},
    "lora+": BASE | {"loraplus_lr_ratio": 4.0},
    "gaussian": BASE | {"init_lora_weights": "gaussian"},
    "orthogonal": BASE | {"init_lora_weights": "orthogonal"},
    "pissa": BASE | {"init_lora_weights": "pissa"},
    "pissa_niter_4": BASE | {"init_lora_weights": "pissa_niter_4"},
    "pissa+rslora": BASE | {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"o_proj": 8}},
    "olora": BASE | {"init_lora_weights": "olora"},
    "eva": BASE | {"init_lora_weights": "eva"},
    "patterns": BASE | {"rank_pattern": {"o_proj": 16}, "alpha_pattern": {"o_proj": 4}},
    "layers": BASE | {"layers": [0, [2, 3]]},
    "modules_to_save": BASE | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": BASE | {"bias": "all"},
    "adalora": {
        "kind": "adalora",
        # The plan of the longer run for both.
        "options": {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS},
    },
    **{
        kind: {"kind": kind, "options": options}
        for kind, options in {
            "beft": {},
            "boft": {"boft_block_size": 8},
            "c3a": {"block_size": 64},
            "fourierft": {},
            "glora": {},
            "gralora": {},
            "hira": {},
            "hra": {},
            "ia3": {},
            "loha": {},
            "lokr": {},
            "miss": {},
            "oft": {},
            "peanut": {},
            "randlora": {},
            "road": {},
            "shira": {},
            "unilora": {},
            "vblora": {"vector_length": 64},
            "vera": {},
            "waveft": {},
        }.items()
    },
}
# On a base in 4 bits: architecture and adapter.
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("qwen2", BASE),
    "nf4 loftq": ("qwen2", BASE | {"init_lora_weights": "loftq"}),
    "nf4 eva": ("qwen2", BASE | {"init_lora_weights": "eva"}),
    "nf4 dora": ("qwen2", BASE | {"use_dora": True}),
    "nf4 adalora": ("qwen2", VARIANTS["adalora"]),
    "nf4 vera": ("qwen2", VARIANTS["vera"]),
    "nf4 modules_to_save": ("qwen2", VARIANTS["modules_to_save"]),
    "nf4 experts": ("deepseek-v3", BASE | {"targets": "all"}),
    "nf4 compressed attention": ("deepseek-v4", BASE | {"targets": "all"}),
}
GROUPS = ("attention", "mlp", "shared-experts", "experts", "all")
# Parts that an architecture does not have, so that a target of that name is refused.
LACKING = {
    "deepseek-v4": ("mlp",),
    **dict.fromkeys(("qwen2", "qwen3", "llama"), ("shared-experts", "experts")),
}
# Kinds that peft can't merge, so that `export --to merged` refuses them.
UNMERGEABLE = ("beft",)


def refusal(name: str) -> str | None:
    """What the message of a row that has to be refused says; None: it has to train."""
    architecture, _, group = name.rpartition(" ")
    return f"model has no {group}" if group in LACKING.get(architecture, ()) else None


@dataclass(frozen=True)
class Trial:
    """What came of a variant.

    Attributes:
        losses: of each step.
        resumed: of the steps from the middle on, from a checkpoint.
        loaded: of the last step's batch, final/ in the hands of peft.
        merged: the same of the merged model, read back by transformers; None if it can't be merged.
        trainable: parameters.
        step_s: seconds a step, the median.
    """

    losses: tuple[float, ...]
    resumed: tuple[float, ...]
    loaded: float
    merged: float | None
    trainable: int
    step_s: float

    def problems(self) -> list[str]:
        """What does not hold."""
        found = []
        if not self.losses[-1] < self.losses[0]:
            found.append(f"the loss does not fall: {self.losses[0]:.4f} to {self.losses[-1]:.4f}")
        if self.resumed != self.losses[MIDDLE:]:
            found.append("other losses after a resume")
        for what, loss in (("loaded", self.loaded), ("merged", self.merged)):
            if loss is not None and abs(loss - self.losses[-1]) > 2e-5 * abs(loss):
                found.append(f"{what} it has loss {loss:.6f} instead of {self.losses[-1]:.6f}")
        return found


def trial(
    store: Store, model: Path, root: Path, adapter: dict[str, Any], quantization: str = "none"
) -> Trial:
    """Trains, resumes and loads one variant; runs lie below `root`."""
    how = {"quantization": quantization}
    whole = _run(store, model, root, "whole", adapter, STEPS, how)
    rows = _rows(whole)
    for step in range(MIDDLE + 1, STEPS + 1):
        shutil.rmtree(whole.run.checkpoints + f"/step-{step:08d}", ignore_errors=True)
    again = _rows(_run(store, model, root, "whole", adapter, STEPS, how))
    shorter = _run(store, model, root, "shorter", adapter, STEPS - 1, how)
    loaded = _loaded(shorter.config.model, Path(shorter.run.final))
    loss = _loss(loaded, whole)
    return Trial(
        losses=tuple(row["loss"] for row in rows),
        resumed=tuple(row["loss"] for row in again[MIDDLE:]),
        loaded=loss,
        merged=_merged(shorter, root / "merged", whole),
        trainable=sum(p.numel() for name, p in _ready(shorter).named_parameters() if p.requires_grad),
        step_s=sorted(row["step_time_s"] for row in rows)[len(rows) // 2],
    )


def _loaded(model: ModelConfig, adapter: Path) -> Any:
    """As people load it; a quantised base, as our own verbs do."""
    if model.quantization != "none":
        return load_for_generation(model, torch.float32, torch.device("cpu"), adapter)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.name), str(adapter)).eval()


def _run(
    store: Store,
    model: Path,
    root: Path,
    name: str,
    adapter: dict[str, Any],
    steps: int,
    of_model: dict[str, Any],
) -> Any:
    given = assignment(
        store,
        model,
        str(root),
        name,
        adapter,
        keep=99,
        of_model=of_model,
        max_steps=steps,
        lr_scheduler_type="constant",
    )
    outcome = work(given, lambda kind, content: None)
    if outcome.error is not None:
        raise UserError(outcome.error)
    return given


def _ready(given: Any) -> Any:
    """The module that was trained, without the base's weights."""
    from raytune_ds.export import _adapted
    from raytune_ds.model.load import skeleton

    return _adapted(given.run, skeleton(given.model), given.config.adapter, given.config.run.seed)


def _rows(given: Any) -> list[dict[str, Any]]:
    return [row for row in given.run.read_metrics() if "loss" in row]


@torch.no_grad()
def _loss(model: Any, given: Any) -> float:
    """Of the batch of the last step, document by document."""
    from raytune_ds.worker import _share

    total = weight = 0.0
    for batch in next(read(given.store, "train", _share(given, World.alone(), 1), range(STEPS - 1, STEPS))):
        lengths = batch.segments.diff().tolist()
        parts = zip(
            *(x[0].split(lengths) for x in (batch.ids_BT, batch.targets_BT, batch.weights_BT)), strict=True
        )
        for ids_T, targets_T, weights_T in parts:
            logits_TV = model(input_ids=ids_T[None]).logits[0]
            total += float((F.cross_entropy(logits_TV, targets_T, reduction="none") * weights_T).sum())
            weight += float(weights_T.sum())
    return total / weight


def _merged(trained: Any, folder: Path, given: Any) -> float | None:
    """The loss of the merged model, as `export --to merged` makes it."""
    try:
        merged = Merged(trained.config.model, Path(trained.run.final))
        folder.mkdir()
        write_weights(str(folder), merged.model, merged, World.alone())
    except (UserError, ExportError) as error:
        if trained.config.adapter.kind in UNMERGEABLE:
            return None
        raise ExportError(f"can't be merged: {first_line(error)}") from error
    save_configs(folder, merged.model, merged.folder, merged.main_dtype)
    return _loss(AutoModelForCausalLM.from_pretrained(folder).eval(), given)


def on_the_demo(out: Console, root: Path, steps: int = 60) -> None:
    """Each variant on the bundled demo's rows, one after the other in this process: what it costs and where it gets."""
    from raytune_ds.check import check
    from raytune_ds.cluster import connect
    from raytune_ds.compose import compose
    from raytune_ds.launch import assign

    words = [
        *("model.name=tiny:qwen2", "data.seq_len=256", "train.global_batch=8", f"train.max_steps={steps}"),
        *(f"run.storage={root}", "train.learning_rate=2e-3", "tracking.to=[]", "engine.kind=ddp"),
    ]
    connect(False)
    given = assign(check(compose([], [*words, "run.name=demo"])))
    out.print(f"{'':18}{'trained':>10}{'s a step':>10}{'first loss':>12}{'last':>9}{'held out':>10}")
    for name, adapter in VARIANTS.items():
        config = given.config.model_copy(update={"adapter": AdapterConfig(**adapter)})
        this = replace(given, config=config, run=RunDir(f"{root}/{name}"))
        outcome = work(this, lambda kind, content: None)
        rows = this.run.read_metrics()
        losses = [row["loss"] for row in rows if "loss" in row]
        step_s = sorted(row["step_time_s"] for row in rows if "loss" in row)[steps // 2]
        held_out = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
        out.print(
            f"{name:18}{outcome.trainable:>10,}{step_s:>10.3f}{losses[0]:>12.3f}{losses[-1]:>9.3f}{held_out:>10.3f}"
        )


def main(only: Sequence[str]) -> int:
    """Prints both tables; the exit code says whether all holds."""
    started = time.monotonic()
    torch.set_num_threads(1)
    from tests.conftest import TEXTS

    out = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if list(only) == ["demo"]:
            on_the_demo(out, root)
            return 0
        models = {name: tiny.build(name, lambda: TEXTS, 0, root / name) for name in tiny.ARCHITECTURES}
        by_kind = [(name, "qwen2", adapter) for name, adapter in VARIANTS.items()]
        by_kind += [(name, *of) for name, of in QUANTIZED.items()]
        by_part = [
            (f"{architecture} {group}", architecture, BASE | {"targets": group})
            for architecture in tiny.ARCHITECTURES
            for group in ("auto", *GROUPS)
        ]
        failed = 0
        out.print(
            f"{'':22}{'trained':>10}{'s a step':>10}{'first loss':>12}{'last':>9}{'loaded':>9}{'merged':>10}"
        )
        for number, (name, architecture, adapter) in enumerate([*by_kind, *by_part]):
            if only and not any(fnmatch(name, pattern) for pattern in only):
                continue
            place, expected = root / str(number), refusal(name)
            try:
                bits = "nf4" if name in QUANTIZED else "none"
                found = trial(prepared(place), models[architecture], place, adapter, bits)
            except UserError as error:
                told = first_line(error)
                failed += (surprise := expected is None or expected not in told)
                out.print(f"{name:22}{'':10}{told}{'  not expected' * surprise}", markup=False)
                continue
            except Exception as error:  # the others are still worth a look
                failed += 1
                out.print(f"{name:22}{'':10}{error!r}", markup=False)
                continue
            problems = "; ".join([*found.problems(), *(["should have been refused"] if expected else [])])
            failed += bool(problems)
            merged = "-" if found.merged is None else f"{found.merged:.4f}"
            out.print(
                f"{name:22}{found.trainable:>10,}{found.step_s:>10.3f}{found.losses[0]:>12.4f}"
                f"{found.losses[-1]:>9.4f}{found.loaded:>9.4f}{merged:>10}  {problems}",
                markup=False,
            )
            shutil.rmtree(place)
    out.print(f"{failed} failed; {time.monotonic() - started:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
