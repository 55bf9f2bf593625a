"""The order of the rooms: a module imports only what stands above it, and the first rooms stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import raytune_ds

HOUSE = "raytune_ds"
ROOT = Path(raytune_ds.__file__).parent

# From the ground up. A package's own __init__ counts as one module; those of the first line import nothing at all.
ROOMS = """
    raytune_ds data model demo sweep verbs
    errors storage tensorfile console hub section servable clusterconfig sweepconfig compatible adapterconfig config
    keys aliases yamlfile problems compose naming confighelp plan command adapterreport ending
    deploy deploy.instances deploy.layout deploy.kubernetes deploy.render deploy.spot_aws deploy.spot_gcp
    lease demo.data data.values data.conversation data.demonstrations data.preferences data.formats
    data.sources data.readers_lines data.readers_json data.readers data.order data.labels data.packing
    data.batchid data.findings data.store data.share data.tokenizer data.mixture data.inputs data.rows data.prepared
    data.bulk data.literal data.thinking data.chat data.plainanswers data.turntokens data.template data.sketch
    data.inspection data.sightings data.job data.chunks data.fit data.scatter data.duplicates data.gate data.buckets
    data.batch data.stream data.tasks data.making data.prepare data.show data.sample data.spelled data.page
    allocator phases world rundir watch downtime stacks profilepage profiling
    model.folder model.tiny model.attention model.kernels model.crossentropy model.packed model.weights model.lowbits
    model.quantize
    model.load model.anatomy model.grouped model.targets model.adapters model.lowrank model.allocation model.initial
    model.adapterreport model.build model.flops model.footprint
    milestones schedule guard bysource
    objectives objectives.sft objectives.preference objectives.reward objectives.grpo
    engines.ds engines.ds.keys engines.ds.work engines.ds.read engines.ds.slips engines.ds.refused engines.ds.ours
    engines.ds.stage engines.ds.autos engines.ds.config
    engines.choose engines.fill engines engines.adamw engines.eightbit engines.ddp engines.fsdp engines.zero
    catalog checkpoint before saver tracking modelcard modelfiles wrapped merge combine logits tuned gguf push
    export loop assignment memory hooks worker found
    sampling decode generate prompts terminal
    network nodes doctor doctor.finding doctor.versions doctor.places doctor.agree doctor.checks doctor.collective
    doctor.cluster doctor.report stopping settle look check
    cluster startup preflight torchgroup display metrics mailbox reporter lookout rescue rayworker early fitting launch
    sweep.records sweep.space sweep.journal sweep.sweepdir sweep.reports sweep.fork sweep.leaderboard sweep.plots
    sweep.influence sweep.report sweep.course sweep.outcome sweep.attempt sweep.trainable sweep.search sweep.schedule
    sweep.board sweep.run sweep.promote sweep.__main__
    trained
    evaluation evaluation.metrics evaluation.intervals evaluation.items evaluation.losses
    evaluation.subject evaluation.scorer evaluation.scoring evaluation.run evaluation.datasets evaluation.comparison
    evaluation.results evaluation.harness evaluation.card evaluation.report evaluate
    demo.run train compare verify steps origin takehome doctor.verb
    serving serving.address serving.asked serving.line serving.replies serving.gate serving.app serving.local
    serving.vllm serving.rayserve
    verbs.answers verbs.data verbs.chat verbs.generate verbs.serve verbs.evaluate verbs.compare verbs.verify
    verbs.render verbs.doctor verbs.demo verbs.export
    cli __main__
""".split()

LIGHT = """
    errors storage console hub section clusterconfig sweepconfig compatible adapterconfig config keys aliases yamlfile
    problems compose naming
    confighelp plan command adapterreport ending
    deploy deploy.instances deploy.layout deploy.kubernetes deploy.render demo.data
    data.values data.conversation data.demonstrations data.preferences data.formats
    data.sources data.readers_lines data.readers_json data.readers data.order data.labels
    network doctor doctor.finding doctor.versions doctor.places doctor.agree doctor.checks doctor.collective
    doctor.report serving.address serving.vllm sweep.records sweep.space sweep.journal sweep.sweepdir sweep.reports
""".split()
HEAVY = ("torch", "ray", "transformers")

# Who alone may import a library.
RESERVED = {
    "ray": {
        "data.stream",
        "data.tasks",
        "deploy.spot_aws",
        "deploy.spot_gcp",
        "nodes",
        "cluster",
        "torchgroup",
        "metrics",
        "mailbox",
        "reporter",
        "lookout",
        "rayworker",
        "early",
        "fitting",
        "launch",
        "evaluation.scoring",
        "sweep.attempt",
        "sweep.trainable",
        "sweep.search",
        "sweep.schedule",
        "sweep.board",
        "sweep.run",
        "serving.rayserve",
    },
    "botocore": {"deploy.spot_aws"},
    "deepspeed": {"engines.zero"},
}
GATHERS_ITS_MEMBERS = ("objectives", "engines")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package at `root` by its short name: 'data.order', and 'data' for the package itself."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts) or HOUSE] = path
    return found


def imports(name: str, path: Path, known: Iterable[str]) -> list[tuple[int, str]]:
    """(line, module) of every import of a file, those inside functions too; the house's own by their short names."""
    package = HOUSE if name == HOUSE else f"{HOUSE}.{name}"
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from package import member` names a module only where there is one of that name.
            members = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, m if m.removeprefix(f"{HOUSE}.") in known else base) for m in members]
    return [(line, module.removeprefix(f"{HOUSE}.")) for line, module in found]


def violations(root: Path) -> list[str]:
    """What breaks the order in the package at `root`, a line each."""
    known = modules(root)
    place = {name: number for number, name in enumerate(ROOMS)}
    broken = [f"{name}: has no place in the order; give it one" for name in known if name not in place]
    for name in known.keys() & place.keys():
        for line, target in imports(name, known[name], known):
            at = f"{name}:{line}"
            library = target.partition(".")[0]
            if library in RESERVED and name not in RESERVED[library]:
                broken.append(f"{at}: imports {library}")
            own_member = name in GATHERS_ITS_MEMBERS and target.startswith(f"{name}.")
            if target in place and place[target] >= place[name] and not own_member:
                broken.append(f"{at}: imports {target}, which stands below it")
    return sorted(broken)


def test_every_module_imports_only_what_stands_above_it() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"storage.py": "import json\nimport raytune_ds.launch"},
            "storage:2: imports launch, which stands below it",
        ),
        ({"storage.py": "from raytune_ds import launch"}, "storage:1: imports launch, which stands below it"),
        ({"data/order.py": "from . import batch"}, "data.order:1: imports data.batch, which stands below it"),
        (
            {"data/order.py": "from .batch import cut"},
            "data.order:1: imports data.batch, which stands below it",
        ),
        ({"data/order.py": "from ..launch import go"}, "data.order:1: imports launch, which stands below it"),
        (
            {"config.py": "def f():\n    from raytune_ds.data.batch import Batch"},
            "config:2: imports data.batch, which stands below it",
        ),
        (
            {"engines/ddp.py": "from raytune_ds.loop import train"},
            "engines.ddp:1: imports loop, which stands below it",
        ),
        ({"loop.py": "from ray.train import report"}, "loop:1: imports ray"),
        ({"engines/ddp.py": "import deepspeed.comm"}, "engines.ddp:1: imports deepspeed"),
        ({"attic.py": ""}, "attic: has no place in the order; give it one"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    sound = {
        "errors.py": "",
        "launch.py": "import ray.data\nfrom raytune_ds import errors, storage",
        "data/batch.py": "from .order import Order\nfrom raytune_ds.errors import UserError",
        "engines/__init__.py": "def f():\n    from raytune_ds.engines.ddp import D",
        "loop.py": "from raytune_ds.engines import f",
    }
    for name, text in {**sound, **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == [expected]


def heavy_imports(names: Iterable[str], path: Path | None = None) -> list[str]:
    """Which of HEAVY a fresh Python has loaded once it has imported `names`."""
    code = f"import importlib, sys\nfor n in {list(names)}: importlib.import_module(n)\n"
    code += f"print(*[m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.split()


def test_light_rooms_load_no_heavy_library() -> None:
    known = modules(ROOT)
    assert heavy_imports(f"{HOUSE}.{name}" for name in LIGHT if name in known) == []


def test_a_driver_that_finds_all_made_before_needs_no_torch() -> None:
    assert heavy_imports([f"{HOUSE}.launch"]) == ["ray"]


def test_an_indirect_heavy_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "between.py").write_text("import torch")
    (tmp_path / "light.py").write_text("import between")
    assert heavy_imports(["light"], tmp_path) == ["torch"]
