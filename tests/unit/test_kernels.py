"""Which kernels a run gets, and that what they replace is computed as before."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.compose import compose
from raytune_ds.config import ModelConfig
from raytune_ds.engines.fill import fill
from raytune_ds.errors import UserError
from raytune_ds.model import attention, kernels
from raytune_ds.model.build import Built, build
from raytune_ds.model.kernels import Kernels
from raytune_ds.objectives.sft import sft
from raytune_ds.world import World
from tests.unit.test_packed import documents, pack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.usefixtures("one_thread")


def built(folder: Path, **switches: Any) -> Built:
    chosen = {key: switches.pop(key) for key in ("experts_implementation",) if key in switches}
    made = build(
        ModelConfig(name=str(folder), **chosen),
        AdapterConfig(),
        0,
        torch.float32,
        torch.float32,
    )
    switches = {"attention": "sdpa", "liger": False, "compiled": False} | switches
    Kernels(**switches).put_into(made.base, made.blocks)
    fill(made.module, made.read, World.alone())
    return made


def loss_and_norm(made: Built, seed: int = 0) -> tuple[float, float]:
    made.module.train()
    loss = sft(made.module, pack(documents(seed))).sum()
    loss.backward()
    squares = [float(p.grad.double().square().sum()) for p in made.module.parameters() if p.grad is not None]
    made.module.zero_grad()
    return float(loss.detach()), sum(squares) ** 0.5


@pytest.fixture
def with_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if liger-kernel and Triton were installed."""
    real = importlib.util.find_spec

    def spec(name: str, *rest: Any) -> Any:
        return SimpleNamespace() if name in ("liger_kernel", "triton") else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "0.8.5")


# ---- what a run gets ------------------------------------------------------------------------------


def chosen(*overrides: str, device: torch.device = CPU, engine: str = "ddp") -> Kernels:
    return Kernels.of(compose([], list(overrides)), engine, device, torch.bfloat16)


def test_auto_takes_what_runs_and_is_installed(with_liger: None) -> None:
    assert chosen() == Kernels(attention="sdpa", liger=False, compiled=False)
    assert chosen(device=CUDA) == Kernels(attention="varlen", liger="auto", compiled=False)
    asked = ("model.attention=sdpa", "model.liger_kernel=false", "train.torch_compile=true")
    assert chosen(*asked, device=CUDA) == Kernels(attention="sdpa", liger=False, compiled=True)


@pytest.mark.parametrize(
    ("asked", "where", "message"),
    [
        (
            "model.liger_kernel=true",
            {"device": CUDA},
            r"liger-kernel 0\.8\.5 or later is not installed; pip install",
        ),
        ("model.liger_kernel=true", {}, r"device=cpu: its kernels are written for GPUs"),
        (
            "train.torch_compile=true",
            {"engine": "fsdp"},
            r"engine\.kind=fsdp: sharded parameters are gathered",
        ),
    ],
)
def test_what_is_asked_for_by_name_is_there_or_refused(
    asked: str, where: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{asked.replace('=', ' = ')}.*{message}"):
        chosen(asked, **where)


@pytest.mark.parametrize("other", ["engine.kind=zero", "engine.kind=fsdp", "model.quantization=nf4"])
def test_compiling_is_refused_before_anything_starts(other: str) -> None:
    with pytest.raises(UserError, match=r"train\.torch_compile"):
        compose([], ["train.torch_compile=true", other])


def test_an_old_liger_counts_as_none(with_liger: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.liger_is_installed()
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "0.8.4.post1")
    assert not kernels.liger_is_installed()


def test_one_line_says_what_is_used(tiny_models: dict[str, Path]) -> None:
    plain = Kernels("varlen", liger=False, compiled=True)
    assert plain.describe(built(tiny_models["qwen2"]).base) == "kernels: varlen attention, compiled layers"
    moe = built(tiny_models["deepseek-v3"]).base
    assert plain.describe(moe) == "kernels: varlen attention, grouped_mm experts, compiled layers"


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_computed_as_the_config_says(tiny_models: dict[str, Path], implementation: str) -> None:
    made = built(tiny_models["deepseek-v3"], experts_implementation=implementation)
    assert made.base.config._experts_implementation == implementation
    usual = loss_and_norm(built(tiny_models["deepseek-v3"]))
    assert loss_and_norm(made) == pytest.approx(usual, rel=1e-4)


# ---- compiled layers ------------------------------------------------------------------------------


def test_compiled_layers_compute_the_same_and_are_compiled_once(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of other numbers and lengths of documents make no other graph."""
    import torch._dynamo as dynamo

    monkeypatch.setattr(attention, "_by_segment", attention.segment_sdpa)  # put back what compiling changes
    dynamo.reset()
    dynamo.utils.counters.clear()
    plain = built(tiny_models["qwen2"])
    # Dynamo alone: the graphs are the same, and no C++ compiler has to run.
    monkeypatch.setattr(nn.Module, "compile", lambda self: _compile(self, backend="eager"))
    compiled = built(tiny_models["qwen2"], compiled=True)
    total = sum(len(row) - 1 for row in documents())
    graphs = []
    for cut in ([total], [10, total - 10], [5, 20, total - 25], [3, 9, 30, total - 42]):
        tokens = [token for row in documents() for token in row]
        rows, at = [], 0
        for length in cut:
            rows.append(tokens[at : at + length + 1])
            at += length
        found = []
        for made in (plain, compiled):
            loss = sft(made.module.train(), pack(rows)).sum()
            loss.backward()
            found.append(float(loss.detach()))
            made.module.zero_grad()
        assert found[1] == pytest.approx(found[0], rel=1e-6)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[2] == graphs[3]  # the second pack showed that the longest document varies
    dynamo.reset()


_compile = nn.Module.compile


# ---- liger ----------------------------------------------------------------------------------------


def fake_liger(monkeypatch: pytest.MonkeyPatch, apply: Any) -> None:
    """A liger-kernel whose function for an architecture is `apply`."""
    code = ModuleType("liger_kernel.transformers.monkey_patch")
    code._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, code.__name__, code)


def test_liger_that_is_asked_for_by_name_is_there_or_refused(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that it does not know it says so in its log, and does nothing."""
    fake_liger(monkeypatch, lambda model, **settings: None)
    made = built(tiny_models["qwen2"], liger="auto")
    assert "liger" not in Kernels("sdpa", "auto", False).describe(made.base)
    with pytest.raises(UserError, match="no kernels for models of type qwen2"):
        built(tiny_models["qwen2"], liger=True)


def test_liger_goes_into_one_model_and_leaves_experts_and_other_models_alone(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as code

    before = dict(vars(code))

    def apply(model: Any, **settings: Any) -> None:
        assert settings == {"cross_entropy": False, "fused_linear_cross_entropy": False}
        code.DeepseekV3RMSNorm = nn.Identity
        code.apply_rotary_pos_emb = lambda *args, **kwargs: pytest.fail("a GPU's kernel ran on a CPU")
        for module in model.modules():
            if type(module).__name__ in ("DeepseekV3RMSNorm", "DeepseekV3Experts"):
                plain = type(module).forward.__get__(module)
                module.forward = lambda *args, _plain=plain, **kwargs: 2 * _plain(*args, **kwargs)
                module.__dict__["_get_name"] = lambda: "Fused"

    fake_liger(monkeypatch, apply)
    monkeypatch.setattr(code, "apply_rotary_pos_emb", code.apply_rotary_pos_emb)  # put back at the end
    plain = built(tiny_models["deepseek-v3"])
    usual = loss_and_norm(plain)
    made = built(tiny_models["deepseek-v3"], liger=True)
    assert code.DeepseekV3RMSNorm is before["DeepseekV3RMSNorm"]
    own = [{type(m).__name__ for m in each.base.modules() if "forward" in vars(m)} for each in (plain, made)]
    assert own[1] - own[0] == {"DeepseekV3RMSNorm"}
    assert "liger norms and SwiGLU" in Kernels("sdpa", True, False).describe(made.base)
    loss, _ = loss_and_norm(made)
    assert loss != pytest.approx(usual[0], rel=1e-3)
    assert loss_and_norm(built(tiny_models["deepseek-v3"])) == pytest.approx(usual, rel=1e-6)


# ---- where there is neither Ray nor DeepSpeed ------------------------------------------------------


def test_the_gpu_bench_needs_no_ray_deepspeed_or_bitsandbytes() -> None:
    code = "import sys\nfor name in ('ray', 'deepspeed', 'bitsandbytes', 'torchao', 'trl', 'datasets'):\n"
    code += "    sys.modules[name] = None\nimport tests.bench.gpu\n"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
