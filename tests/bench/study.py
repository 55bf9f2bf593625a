"""What a search is worth: the best held-out loss so far against the tokens spent, for three ways to spend them.

The default settings once; random search without stopping; TPE with ASHA, which spends the same tokens on more trials.
On the bundled demo's base model and domain, and on a data set of yours, with a base model that is first trained on raw
text.

    python -m tests.bench.study FOLDER [RAW_TEXT ALPACA_FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from raytune_ds import cluster, storage
from raytune_ds.compose import compose
from raytune_ds.config import Config
from raytune_ds.console import human_count, say
from raytune_ds.demo.data import domain_rows, general_rows, held_out_rows, write_rows
from raytune_ds.launch import launch
from raytune_ds.sweep.journal import Journal
from raytune_ds.sweep.run import sweep

# So many full runs' tokens for either search.
FULL_RUNS = 8
WORKERS = ["scaling.num_workers=1", "scaling.use_gpu=false", "train.micro_batch=2", "tracking.to=[]"]
SPACE = (
    "sweep.space={adapter.r: {choice: [4, 8, 16, 32, 64]}, adapter.alpha: {expr: 2 * adapter.r}, "
    "train.learning_rate: {loguniform: [1.0e-4, 2.0e-2]}, train.warmup_ratio: {choice: [0.0, 0.03, 0.1]}, "
    "adapter.dropout: {choice: [0.0, 0.05, 0.1]}}"
)

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Task:
    """A base model, data to adapt it to, and how long that takes.

    Attributes:
        name: in file names and the plot.
        base: overrides of the base model's run.
        data: overrides of each trial's.
    """

    name: str
    base: list[str]
    data: list[str]


def demo_task(folder: Path) -> Task:
    """The bundled demo's."""
    files = {name: folder / f"{name}.jsonl" for name in ("general", "domain", "held-out")}
    for path, rows in zip(files.values(), (general_rows(), domain_rows(), held_out_rows()), strict=True):
        write_rows(rows, path)
    base = [
        "model.name=tiny:deepseek-v3",
        "adapter.kind=none",
        f"data.sources={files['general']}",
        "data.eval.fraction=0",
        "data.seq_len=512",
        "train.global_batch=4",
        "train.learning_rate=2e-3",
        "train.num_train_epochs=12",
    ]
    data = [
        f"data.sources={files['domain']}",
        f"data.eval.sources={files['held-out']}",
        "data.seq_len=512",
        "train.global_batch=4",
        "train.max_steps=90",
    ]
    return Task("demo", base, data)


def alpaca_task(text: str, rows: str) -> Task:
    """Instructions, for a base model that was trained on raw text."""
    base = [
        "model.name=tiny:deepseek-v3",
        "adapter.kind=none",
        "objective.kind=pretrain",
        f"data.sources={text}",
        "data.eval.fraction=0",
        "data.seq_len=512",
        "train.global_batch=8",
        "train.learning_rate=2e-3",
        "train.max_steps=300",
    ]
    data = [
        f"data.sources={rows}",
        "data.eval.fraction=0.05",
        "data.seq_len=512",
        "train.global_batch=8",
        "train.max_steps=45",
    ]
    return Task(Path(rows).stem, base, data)


def study(task: Task, folder: Path) -> dict[str, Points]:
    """Runs all of it, or finds it done; (tokens spent, best held-out loss so far) by the way they were spent."""
    root = [f"run.storage={folder}", *WORKERS]
    say(f"\n{task.name}", style="bold")
    base = launch(compose([], [*root, f"run.name={task.name}-base", *task.base]))
    data = [*root, f"model.name={base.run}/final", *task.data]
    one = _sweep(compose([], [*data, f"run.name={task.name}-default", *_default()]))
    tokens = max(tokens for tokens, _ in one)
    budget = [SPACE, f"sweep.budget.tokens={int(FULL_RUNS * tokens)}"]
    random = ["sweep.searcher.kind=random", "sweep.scheduler.kind=none", f"sweep.trials={FULL_RUNS}"]
    asha = ["sweep.searcher.kind=optuna", "sweep.scheduler.kind=asha", "sweep.trials=60"]
    return {
        "default settings": one,
        "random search": _sweep(compose([], [*data, f"run.name={task.name}-random", *budget, *random])),
        "TPE with ASHA": _sweep(compose([], [*data, f"run.name={task.name}-asha", *budget, *asha])),
    }


def _default() -> list[str]:
    rate = Config().train.learning_rate
    return [
        f"sweep.space={{train.learning_rate: {{choice: [{rate}]}}}}",
        "sweep.trials=1",
        "sweep.scheduler.kind=none",
        "sweep.searcher.kind=random",
    ]


def _sweep(config: Config) -> Points:
    swept = sweep(config)
    return list(_best_so_far(Journal(swept.sweep.journal)))


def _best_so_far(journal: Journal) -> Iterator[tuple[float, float]]:
    """In the order in which the reports came."""
    spent: dict[int, int] = {}
    best = float("inf")
    for event in journal.events:
        if event["event"] == "report":
            report = event["report"]
            spent[event["trial"]] = report["tokens"]
            best = min(best, report["metrics"]["eval_loss"])
            yield sum(spent.values()), best


def draw(studies: dict[str, dict[str, Points]], path: Path) -> None:
    """A picture beside another for each task."""
    figure, axes = pyplot.subplots(1, len(studies), figsize=(5.2 * len(studies), 3.8), squeeze=False)
    for axis, (name, curves) in zip(axes[0], studies.items(), strict=True):
        most = max(tokens for points in curves.values() for tokens, _ in points)
        for (label, points), color in zip(
            curves.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True
        ):
            tokens, losses = map(list, zip(*points, (most, points[-1][1]), strict=True))
            axis.step(tokens, losses, where="post", label=f"{label}: {losses[-1]:.3f}", color=color)
        axis.set_title(name)
        axis.set_xlabel("tokens spent")
        axis.set_ylabel("best held-out loss so far")
        axis.xaxis.set_major_formatter(lambda value, _: human_count(value))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    """Runs the study into a folder; the picture is study.svg there."""
    folder = Path(storage.absolute(arguments[0]))
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [demo_task(folder)]
    if len(arguments) == 3:
        tasks.append(alpaca_task(*map(storage.absolute, arguments[1:])))
    cluster.connect(debug=False)
    studies = {task.name: study(task, folder) for task in tasks}
    draw(studies, folder / "study.svg")
    for name, curves in studies.items():
        for label, points in curves.items():
            say(f"{name}, {label}: {points[-1][1]:.4f} after {human_count(points[-1][0])} tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
